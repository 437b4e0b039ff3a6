"""One prompt over several GPUs: attention over tokens that are dealt out to the ranks of a `DeviceMesh`."""

from .attention import attention, shard, unshard
from .dealing import Dealing

__all__ = ["Dealing", "attention", "shard", "unshard"]
