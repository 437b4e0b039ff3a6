"""Answers of two prompts, and how many layers of prefills this process accelerated, as JSON on the last line:
``python parallel.py RANKS [compiled]``. A script, because vLLM's workers are processes that import it again."""

from __future__ import annotations

import json
import sys

import serving

from mask_builders import AShape, VerticalSlash
from mmflex.integrations.vllm import options

SPEC = {
    0: [VerticalSlash(40, 128), AShape(16, 128), AShape(64, 256), VerticalSlash(64, 256)],
    1: VerticalSlash(40, 128),
}


def main() -> None:
    given = {"tensor_parallel_size": int(sys.argv[1]), "max_num_batched_tokens": 1024}
    given["enforce_eager"] = "compiled" not in sys.argv
    given["distributed_executor_backend"] = "mp" if int(sys.argv[1]) > 1 else None
    config = options(SPEC, threshold=200, backend="reference")
    with serving.engine(serving.text_model(), config, **given) as llm:
        found = serving.answers(llm, [serving.ids(1500), serving.ids(30, 1)])
        layers = serving.accelerated().counters.layers if sys.argv[1] == "1" else None
        print("\n" + json.dumps({"answers": found, "layers": layers}), flush=True)


if __name__ == "__main__":
    main()
