"""One process that runs checks: jobs come in as lines of JSON, results go out as lines of JSON."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any

OK, NOT_RUN = "ok", "not run"


def result(group: str, settings: dict[str, Any], device: str) -> dict[str, Any]:
    """Runs one check: what its group found, with ``verdict``: "ok", "not run: why", or what is wrong."""
    import torch

    from ..runtime import backends
    from ..runtime.pairs import VerificationError
    from .groups import GROUPS
    from .jobs import NotRun

    begin, cpu, kernels, facts = time.perf_counter(), _cpu_seconds(), backends.compiles, {}
    try:
        facts = GROUPS[group].run(settings, device)
        verdict = OK
    except NotRun as reason:
        verdict = f"{NOT_RUN}: {reason}"
    except torch.OutOfMemoryError as error:
        verdict = f"{NOT_RUN}: {str(error).splitlines()[0]}"
        torch.cuda.empty_cache()
    except VerificationError as wrong:
        verdict = f"WRONG: {wrong}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {error}"[:600]
        verdict = f"FAILED: {message} ({os.path.basename(where.filename)}:{where.lineno})"
    took = {"seconds": round(time.perf_counter() - begin, 2), "cpu_seconds": round(_cpu_seconds() - cpu, 2)}
    return {**facts, "verdict": verdict, **took, "kernels": backends.compiles - kernels}


def _cpu_seconds() -> float:
    """Of this process and of the compilers that it called: what a check takes on a machine that does other things."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> None:
    """Reads ``{"group", "settings", "device"}`` lines until there are no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints is no answer
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(result(asked["group"], asked["settings"], asked["device"])), file=answers)


if __name__ == "__main__":
    main()
