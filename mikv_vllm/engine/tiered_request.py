"""The tiers of one compressed request, as the scheduler counts them."""

from dataclasses import dataclass

from mikv_vllm.tiers.formats import HIGH_RECORD_TOKENS
from mikv_vllm.tiers.plan import AppendStep, TierPlanner, TierSizes


class TieredRequest:
    """Sizes of the tiers of one compressed request. Its pages are in ``req_to_blocks``."""

    def __init__(self, planner: TierPlanner, sizes: TierSizes) -> None:
        self.planner = planner
        self._next: AppendStep | None = None
        self.resize(sizes)

    @property
    def sizes(self) -> TierSizes:
        """Sizes, including the tokens of this step."""
        known = self._sizes
        high_tokens = self.num_tokens - known.low_tokens
        return TierSizes(known.pages, high_tokens, known.low_records, known.low_end_bytes)

    def resize(self, sizes: TierSizes) -> None:
        """Give the tiers these sizes."""
        self._sizes = sizes
        self.num_tokens = sizes.num_tokens
        self.free_slots = -sizes.high_tokens % HIGH_RECORD_TOKENS
        """Tokens that the last high record can still take."""

    def grow(self, num_tokens: int) -> AppendStep:
        """Return the step after which the tiers hold ``num_tokens`` tokens. Changes no sizes."""
        step = self._next
        if step is None or step.after.num_tokens != num_tokens:
            count, planner = num_tokens - self.num_tokens, self.planner
            step = planner.append(self.sizes) if count == 1 else planner.extend(self.sizes, count)
            self._next = step  # vLLM asks for the number of pages first, then allocates them
        return step

    def pages_to_grow(self, num_tokens: int) -> int:
        """Pages that have to be allocated until there are ``num_tokens`` tokens."""
        return self.grow(num_tokens).new_pages if num_tokens > self.num_tokens else 0


@dataclass
class TierTotals:
    """Sum of the tiers of all compressed requests.

    ``pages`` counts pages of the pool, the other fields count per layer and KV head.
    """

    pages: int = 0
    high_tokens: int = 0
    high_records: int = 0
    low_records: int = 0
    low_bytes: int = 0

    def count(self, tiered: TieredRequest, sign: int = 1) -> None:
        """Add a request, or with ``sign`` -1 subtract it."""
        sizes = tiered.sizes
        self.pages += sign * sizes.pages
        self.high_tokens += sign * sizes.high_tokens
        self.high_records += sign * -(-sizes.high_tokens // HIGH_RECORD_TOKENS)
        self.low_records += sign * sizes.low_records
        self.low_bytes += sign * sizes.low_records * tiered.planner.low_record_bytes
