"""The 256 token ids that all evaluation tasks share."""

BOS = 1
VISION_START = 2
VISION_END = 3
IMAGE = 4
VIDEO = 5
QUESTION = 6
"""``QUESTION key``: the next-token logits of the key are the answer."""
FACT = 7
"""``FACT key value``: a needle in text."""
SET = 8
"""``SET name value``: the first link of a chain (variable tracking)."""
COPY = 9
"""``COPY name source``: a further link: ``name`` has the value of ``source``."""

SIZE = 64
KEYS = 64
"""Ids 64 to 127: what is asked for (also: names of variables). Key glyph i is token ``KEYS + i``."""
VALUES = 128
"""Ids 128 to 191: answers. Value glyph i is token ``VALUES + i``."""
COUNTERS = 192
"""Ids 192 to 255: running text."""

VOCABULARY = 256
