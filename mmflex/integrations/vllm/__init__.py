"""Long prompts through mmflex in vLLM, switched on by one option::

    vllm serve MODEL --additional-config '{"mmflex": {"config": "config.json"}}'

vLLM finds `plugin.register` by its entry point group ``vllm.general_plugins``. Without the option nothing changes. With
it, requests with many new tokens in a step run `mmflex.attention`; everything else runs the standard backend, in the
same step (`backend` has the rules).

============== =====================================================================================================
`settings`     what ``additional_config["mmflex"]`` says
`engine`       what is read from vLLM's own config
`requests`     which request is which row of a step, and which of its tokens is what
`batch`        a step's rows as runs: long prefills alone, the others together
`pages`        keys and values of one request out of the paged cache
`backend`      the mixin over a standard attention backend; it imports no vLLM
`warmup`       kernels compiled and memory taken while vLLM profiles itself
`metrics`      counters
`cuda`, `cpu`  the two bindings, which do import vLLM
============== =====================================================================================================
"""

from .settings import options

__all__ = ["options"]
