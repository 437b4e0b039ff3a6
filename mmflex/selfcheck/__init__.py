"""``mmflex check``: is mmflex right on this machine?

`groups` lists the groups of checks, each a module with ``jobs`` and ``run``; `lowerings` is the largest. Its cases
(`cases`) are chosen by `covering` from the works of `works`, whose masks `oracle` knows in plain numpy, and `proof`
runs one. `runner` spreads jobs over `worker` processes, `report` is what comes of it. Only the command line imports
this package.
"""

from .report import Report
from .runner import check

__all__ = ["Report", "check"]
