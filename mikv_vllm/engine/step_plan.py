"""The plan: the decisions of the scheduler for one step, which the workers execute."""

from dataclasses import dataclass, field
from typing import Self

from vllm.v1.core.sched.output import SchedulerOutput

from mikv_vllm.tiers.blocks import TailStep
from mikv_vllm.tiers.formats import LowFormat
from mikv_vllm.tiers.plan import TierSizes


@dataclass(frozen=True)
class ScoreStep:
    """Add to a native request's importance scores, from its last queries of this step."""

    num_queries: int
    num_tokens: int
    """Tokens of the request, including those of this step."""
    capacity: int
    """Maximum number of tokens of the request before it is compressed or ends."""
    reset: bool
    """Whether the scores are set to zero first."""


@dataclass(frozen=True)
class BlockTable:
    """A block of a request, as kernels read it."""

    pages: tuple[int, ...]
    """Page ids, in the order of the stream."""
    sizes: TierSizes
    low_format: LowFormat


@dataclass(frozen=True)
class CompressStep:
    """Move a whole native request into blocks, after this step's attention."""

    native_pages: tuple[int, ...]
    blocks: tuple[BlockTable, ...]
    """The last one is the tail."""
    shared: frozenset[int]
    """Indices of blocks that exist already, and that other requests may read."""
    in_place: bool
    """Whether some pages of ``blocks`` are among ``native_pages``."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the request."""
        return sum(block.sizes.num_tokens for block in self.blocks)


@dataclass(frozen=True)
class DecodeStep:
    """Tokens join the last block of a compressed request: one and its drafts, or those of a prompt
    chunk."""

    before: TierSizes
    """In the stream as long as it is afterwards."""
    append: TailStep
    new_pages: tuple[int, ...]
    """Page ids, one for each of ``append.new_positions``."""
    low_format: LowFormat
    begins: bool
    """Whether the block is new, with the header of the block before it."""
    sealed: BlockTable | None = None
    """The block that it is written anew as, after attention, if the step fills it. Pages that are
    not in it are released after the step."""


@dataclass(frozen=True)
class VerifiedDrafts:
    """What became of the drafts of a compressed request's last step."""

    accepted: int
    rejected: int
    """They leave the high tier; they were its newest tokens."""


@dataclass(frozen=True)
class ExtendStep:
    """The next chunk of a prompt whose beginning is compressed; stored after its attention."""

    first_token: int
    """Tokens of the request before the step."""
    changes: tuple[DecodeStep, ...]
    """One for each block that takes tokens of the chunk, in order."""
    num_queries: int
    """Number of queries at the end of the chunk that score all tokens."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the chunk."""
        return sum(change.append.new_tokens for change in self.changes)


OPERATIONS = ("compress", "compress_in_place", "demote", "reuse", "copy", "evict")
"""Operations that are counted since the start; see :attr:`TierStats.operations`."""


@dataclass(frozen=True)
class TierStats:
    """Contents of the tiers and total numbers of operations, after a step is scheduled."""

    pages: dict[str, int] = field(default_factory=dict)
    """Pages of the pool: ``total``, ``free``, ``native``, ``tiered``."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Tokens: ``native``, ``high``, ``low``."""
    bytes: dict[str, int] = field(default_factory=dict)
    """Bytes of tiered pages over all layers and heads: ``high``, ``low``, ``unused``."""
    blocks: dict[str, int] = field(default_factory=dict)
    """Tiered blocks: ``sealed`` and ``tail``, which requests hold, and ``kept``, which no request
    holds but the prefix cache finds. Their pages are ``tiered``, those of kept ones ``free``."""
    operations: dict[str, int] = field(default_factory=dict)
    """Totals since the start: ``compress`` (of these ``compress_in_place``), ``demote``, ``reuse``
    (requests that took blocks from the prefix cache), ``copy`` (tails that were copied for them),
    ``evict`` (kept blocks whose pages were allocated again)."""
    reused_tokens: dict[str, int] = field(default_factory=dict)
    """Totals since the start, of tokens in blocks that requests took from the prefix cache:
    ``adopt`` (instead of computing them), ``compress`` (instead of compressing them)."""
    requests: dict[str, int] = field(default_factory=dict)
    """Running requests: ``native``, ``tiered``."""

    @classmethod
    def idle(cls, pages: int) -> Self:
        """Statistics of an engine with ``pages`` pages before its first step."""
        return cls(
            pages={"total": pages, "free": pages, "native": 0, "tiered": 0},
            tokens={"native": 0, "high": 0, "low": 0},
            bytes={"high": 0, "low": 0, "unused": 0},
            blocks={"sealed": 0, "tail": 0, "kept": 0},
            operations=dict.fromkeys(OPERATIONS, 0),
            reused_tokens={"adopt": 0, "compress": 0},
            requests={"native": 0, "tiered": 0},
        )


@dataclass(frozen=True)
class StepPlan:
    """The plan of one step. The keys of all maps are request ids."""

    score: dict[str, ScoreStep] = field(default_factory=dict)
    compress: dict[str, CompressStep] = field(default_factory=dict)
    decode: dict[str, DecodeStep] = field(default_factory=dict)
    """Steps that demote, or add pages. In other compressed requests of the batch, the new token
    joins the high tier, and nothing else changes."""
    extend: dict[str, ExtendStep] = field(default_factory=dict)
    verified: dict[str, VerifiedDrafts] = field(default_factory=dict)
    """Requests whose last step had drafts."""
    adopt: dict[str, tuple[BlockTable, ...]] = field(default_factory=dict)
    """Requests that begin with blocks of the prefix cache."""
    copy: tuple[tuple[int, int], ...] = ()
    """Pages to copy before anything else is done in this step: from, to. Those of tails that
    requests begin with, and pages of both tiers of tails that grow."""
    zero: tuple[int, ...] = ()
    """Pages that are set to zero at the beginning of the step."""
    stats: TierStats = field(default_factory=TierStats)


@dataclass
class TieredSchedulerOutput(SchedulerOutput):
    """vLLM's ``SchedulerOutput`` with the plan."""

    plan: StepPlan = field(default_factory=StepPlan)
