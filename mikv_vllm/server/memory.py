"""How much memory the KV cache gets on CPU when the user names no size."""

import os
from collections.abc import Mapping
from typing import Any

GIB = 1 << 30
SHARE = 0.25
"""Share of the free memory that the cache gets, all workers of this machine together."""
EMBEDDED_LIMIT = 4 * GIB
"""The most that the small embedded model gets."""


def cpu_cache_bytes(
    engine_args: Mapping[str, Any], available: int, limit: int | None = None
) -> int | None:
    """Bytes of KV cache for each worker, or None if the user chose a size.

    vLLM's own default takes 92 % of a NUMA node, and refuses to start where that is not free.

    Args:
        engine_args: vLLM's engine arguments by field name.
        available: free bytes of the NUMA node that vLLM's workers start on.
        limit: the most bytes to take.
    """
    if engine_args.get("kv_cache_memory_bytes") or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return None
    workers = 1
    for size in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        workers *= engine_args.get(size) or 1
    share = int(SHARE * available) // workers
    return share if limit is None else min(share, limit)


def available_bytes() -> int:
    """Free bytes of the NUMA node that vLLM's workers start on, within the container's limit."""
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info

    return get_memory_node_info(get_allowed_cpu_list()[0].numa_node).available_memory
