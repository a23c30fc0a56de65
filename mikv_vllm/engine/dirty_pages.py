"""Pages that hold bytes of tiers and have to be zeroed before vLLM's kernel reads them."""

from collections.abc import Callable, Iterable, Sequence

from vllm.v1.core.kv_cache_utils import KVCacheBlock


class DirtyPages:
    """Follows which pages were tiered since they were last native.

    vLLM's kernel multiplies the unwritten slots of a page by 0. Bytes of a tier can read as NaN
    there.

    Args:
        on_reuse: called with the ids of tiered pages that are allocated again, as tiered or as
            native pages.
    """

    def __init__(self, on_reuse: Callable[[Iterable[int]], None]) -> None:
        self._on_reuse = on_reuse
        self._dirty: set[int] = set()
        self._to_zero: list[int] = []

    def add(self, pages: Iterable[KVCacheBlock]) -> None:
        """Pages become tiered."""
        ids = {page.block_id for page in pages}
        self._on_reuse(self._dirty & ids)
        self._dirty |= ids

    def clean(self, pages: Sequence[KVCacheBlock]) -> None:
        """Pages become native: have the last one zeroed. A step fills all but its last new page."""
        stale = self._dirty.intersection(page.block_id for page in pages)
        self._on_reuse(stale)
        self._dirty -= stale
        if pages and pages[-1].block_id in stale:
            self._to_zero.append(pages[-1].block_id)

    def drain(self) -> tuple[int, ...]:
        """Drain the pages that have to be zeroed before this step's tokens are written."""
        pages, self._to_zero = tuple(self._to_zero), []
        return pages
