"""Default size of the KV cache on CPU, for when the user does not set one."""

import os
from collections.abc import Mapping
from typing import Any

GIB = 1 << 30
SHARE = 0.25
"""Share of the free memory that the caches of all workers on this machine use together."""
EMBEDDED_LIMIT = 4 * GIB
"""Largest default cache of the embedded model, in bytes; the model is small."""


def cpu_cache_bytes(
    engine_args: Mapping[str, Any], available: int, limit: int | None = None
) -> int | None:
    """Return the bytes of KV cache for each worker, or None if the user set a size.

    vLLM's own default is 92 % of a NUMA node, and vLLM does not start if less is free.

    Args:
        engine_args: vLLM's engine arguments by field name.
        available: free bytes of the NUMA node on which vLLM's workers start.
        limit: largest number of bytes to return.
    """
    if engine_args.get("kv_cache_memory_bytes") or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return None
    workers = 1
    for size in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        workers *= engine_args.get(size) or 1
    share = int(SHARE * available) // workers
    return share if limit is None else min(share, limit)


def available_bytes() -> int:
    """Return the free bytes of the NUMA node on which vLLM's workers start.

    The limit of a container is taken into account.
    """
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info

    return get_memory_node_info(get_allowed_cpu_list()[0].numa_node).available_memory
