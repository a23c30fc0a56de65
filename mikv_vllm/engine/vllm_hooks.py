"""Methods of vLLM that the engine replaces at run time, one function for each hook.

The other modules of this package contain the behaviour and pass it to these functions. A method is
replaced on one object of this process, never on a class. Each docstring names the file in
``patches/`` that would make the hook unnecessary, if there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from vllm.config import CUDAGraphMode

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
    from vllm.v1.request import Request
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from mikv_vllm.engine.dirty_pages import DirtyPages
    from mikv_vllm.engine.tier_store import TierStore


def append_tokens_first(manager: KVCacheManager, store: TierStore) -> None:
    """Try :meth:`TierStore.append_token` before ``KVCacheManager.allocate_slots``.

    Most decode steps of a compressed request allocate no page. In such a step, vLLM's method would
    take most of the time that the scheduler spends on the request. Patch: none.
    """
    allocate = manager.allocate_slots

    @wraps(allocate)
    def allocate_slots(request: Request, num_new_tokens: int, *args: Any, **kwargs: Any) -> Any:
        num_tokens = request.num_computed_tokens + num_new_tokens
        if num_new_tokens == 1 and store.append_token(request.request_id, num_tokens):
            return manager.empty_kv_cache_blocks
        return allocate(request, num_new_tokens, *args, **kwargs)

    manager.allocate_slots = allocate_slots


def follow_other_group(manager: SingleTypeKVCacheManager, dirty: DirtyPages, window: int) -> None:
    """Follow the manager of another cache group, for example of sliding windows.

    The pages that it allocates may have been tiered before: they have to be zeroed. And of a prompt
    it keeps only those pages in the prefix cache that a request with the same prompt reads, and a
    compressed request reads those before its last ``window`` tokens. Patch: none.

    Args:
        manager: its ``allocate_new_blocks`` and ``cache_blocks`` are replaced.
        dirty: pages that were tiered.
        window: queries at the end of a prompt that score it.
    """
    allocate, cache = manager.allocate_new_blocks, manager.cache_blocks

    @wraps(allocate)
    def allocate_new_blocks(*args: Any, **kwargs: Any) -> list[KVCacheBlock]:
        blocks = allocate(*args, **kwargs)
        dirty.clean(blocks)
        return blocks

    @wraps(cache)
    def cache_blocks(request: Request, *args: Any, replay_boundaries: Any, **kwargs: Any) -> None:
        boundary = max(0, request.num_prompt_tokens - window)
        cache(request, *args, replay_boundaries=(*replay_boundaries, boundary), **kwargs)

    manager.allocate_new_blocks = allocate_new_blocks
    manager.cache_blocks = cache_blocks


def observe_batches(runner: GPUModelRunner, observe: Callable[[Any], None]) -> None:
    """Call ``observe`` with each batch before the V2 model runner prepares its attention.

    The metadata builders have to know the request of each row of a batch. Patch: none.
    """
    prepare = runner.prepare_attn

    @wraps(prepare)
    def prepare_attn(input_batch: Any) -> Any:
        observe(input_batch)
        return prepare(input_batch)

    runner.prepare_attn = prepare_attn


def leave_full_graphs(dispatcher: CudagraphDispatcher, is_native: Callable[[], bool]) -> None:
    """Run steps that read or change tiers piecewise, with attention outside of CUDA graphs.

    The number of kernels that the tiers need differs from step to step. Patch: none.

    Args:
        dispatcher: its ``dispatch`` is replaced.
        is_native: tells whether the current step reads and changes no tiers.
    """
    dispatch = dispatcher.dispatch

    @wraps(dispatch)
    def dispatch_step(*args: Any, **kwargs: Any) -> Any:
        if not is_native():
            invalid = kwargs.get("invalid_modes") or frozenset()
            kwargs["invalid_modes"] = invalid | {CUDAGraphMode.FULL}
        return dispatch(*args, **kwargs)

    dispatcher.dispatch = dispatch_step


def leave_full_graphs_v2(manager: CudaGraphManager | None, is_native: Callable[[], bool]) -> None:
    """Do the same as :func:`leave_full_graphs` for the V2 model runner.

    Its full graphs are those of uniform batches, so the batch is declared not uniform. Patch: none.
    """
    if manager is None:
        return
    dispatch = manager.dispatch

    @wraps(dispatch)
    def dispatch_step(
        num_reqs: int, num_tokens: int, uniform_token_count: int | None, **kwargs: Any
    ) -> Any:
        if not is_native():
            uniform_token_count = kwargs["max_query_len"] = None
        return dispatch(num_reqs, num_tokens, uniform_token_count, **kwargs)

    manager.dispatch = dispatch_step
