"""A worker that can be told to do its work wrong: the tests have to notice."""

from contextlib import contextmanager
from dataclasses import replace

import torch

from mikv_vllm.engine.cpu_worker import TieredCPUWorker
from mikv_vllm.kernels.cpu import LayerOps
from mikv_vllm.tiers.formats import TierGeometry

MUTATIONS = ("zeroed low tier", "shuffled heads", "wrong scale", "zeroed output")
"""Wrong for every compressed request. "zeroed workspace" is wrong for long prompts alone, "pages
not copied" for tails that grow."""

_compress, _decode, _restore = LayerOps.compress, LayerOps.decode, LayerOps.restore


def _page_bytes(cache: torch.Tensor) -> torch.Tensor:
    return cache.view(torch.uint8).reshape(cache.shape[0], cache.shape[1], -1)


def _zeroed_low_tier(self, cache, native_table, tiered_table, sizes, low_format, *args):
    _compress(self, cache, native_table, tiered_table, sizes, low_format, *args)
    geometry = TierGeometry(cache.shape[-1] // 2, cache.shape[2])
    first = sizes.low_end_bytes - sizes.low_records * geometry.low(low_format).num_bytes
    pages = _page_bytes(cache)
    for i, page in enumerate(tiered_table.tolist()):
        pages[page, :, max(0, first - i * geometry.page_bytes) :] = 0


def _shuffled_heads(self, cache, native_table, tiered_table, *args):
    _compress(self, cache, native_table, tiered_table, *args)
    pages = _page_bytes(cache)
    index = tiered_table.long()
    pages[index] = pages[index].roll(1, dims=1)


def _wrong_scale(self, cache, batch, query, key, value, output):
    _decode(self, cache, batch, query * 1.25, key, value, output)


def _zeroed_output(self, cache, batch, query, key, value, output):
    _decode(self, cache, batch, query, key, value, output)
    output.zero_()


def _zeroed_workspace(self, cache, tiered_table, sizes, low_format, native):
    _restore(self, cache, tiered_table, sizes, low_format, native)
    native.zero_()


class MutableWorker(TieredCPUWorker):
    """The real worker, and on request a wrong one."""

    copies_pages = True

    def execute_model(self, scheduler_output):
        if not self.copies_pages:
            plan = replace(scheduler_output.plan, copy=())
            scheduler_output = replace(scheduler_output, plan=plan)
        return super().execute_model(scheduler_output)

    def mutate(self, mutation: str | None) -> None:
        """Do one thing wrong from now on; None for nothing."""
        LayerOps.compress, LayerOps.decode, LayerOps.restore = _compress, _decode, _restore
        self.copies_pages = mutation != "pages not copied"
        match mutation:
            case "zeroed low tier":
                LayerOps.compress = _zeroed_low_tier
            case "shuffled heads":
                LayerOps.compress = _shuffled_heads
            case "wrong scale":
                LayerOps.decode = _wrong_scale
            case "zeroed output":
                LayerOps.decode = _zeroed_output
            case "zeroed workspace":
                LayerOps.restore = _zeroed_workspace
            case _:
                assert mutation in (None, "pages not copied"), mutation


@contextmanager
def mutated(engine, mutation: str):
    """The engine does one thing wrong here; its prefix cache is empty before and after."""
    engine.reset_prefix_cache()
    engine.collective_rpc("mutate", args=(mutation,))
    try:
        yield
    finally:
        engine.collective_rpc("mutate", args=(None,))
        engine.reset_prefix_cache()
