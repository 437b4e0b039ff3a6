"""What the pages take from the code and from benchmark results, so that they cannot disagree with either.

``python -m docs.tools`` writes formulas, numbers and pictures of patterns into the pages; the site's build makes the
tables (`markers.TABLES`).
"""
