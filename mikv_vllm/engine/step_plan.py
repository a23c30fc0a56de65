"""The plan: the decisions of the scheduler for one step, which the workers execute."""

from dataclasses import dataclass, field
from typing import Self

from vllm.v1.core.sched.output import SchedulerOutput

from mikv_vllm.tiers.formats import LowFormat
from mikv_vllm.tiers.plan import AppendStep, TierSizes


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
class CompressStep:
    """Compress a native request into tiered pages, after the attention of this step."""

    native_pages: tuple[int, ...]
    tiered_pages: tuple[int, ...]
    sizes: TierSizes
    low_format: LowFormat
    in_place: bool
    """Whether some of ``tiered_pages`` are among ``native_pages``."""


@dataclass(frozen=True)
class DecodeStep:
    """One step of a compressed request."""

    before: TierSizes
    append: AppendStep
    new_pages: tuple[int, ...]
    """New pages of the request, ``append.new_pages`` of them."""
    low_format: LowFormat


@dataclass(frozen=True)
class ExtendStep(DecodeStep):
    """The next chunk of a prompt whose beginning is compressed; stored after its attention."""

    num_queries: int
    """Number of queries at the end of the chunk that score all tokens."""


@dataclass(frozen=True)
class TierStats:
    """Contents of the tiers and total numbers of operations, after a step is scheduled."""

    pages: dict[str, int] = field(default_factory=dict)
    """Pages of the pool: ``total``, ``free``, ``native``, ``tiered``."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Tokens: ``native``, ``high``, ``low``."""
    bytes: dict[str, int] = field(default_factory=dict)
    """Bytes of tiered pages over all layers and heads: ``high``, ``low``, ``unused``."""
    operations: dict[str, int] = field(default_factory=dict)
    """Totals since the start: ``compress`` (of these ``in_place``), ``demote``."""
    requests: dict[str, int] = field(default_factory=dict)
    """Running requests: ``native``, ``tiered``."""

    @classmethod
    def idle(cls, pages: int) -> Self:
        """Statistics of an engine with ``pages`` pages before its first step."""
        return cls(
            pages={"total": pages, "free": pages, "native": 0, "tiered": 0},
            tokens={"native": 0, "high": 0, "low": 0},
            bytes={"high": 0, "low": 0, "unused": 0},
            operations={"compress": 0, "compress_in_place": 0, "demote": 0},
            requests={"native": 0, "tiered": 0},
        )


@dataclass(frozen=True)
class StepPlan:
    """The plan of one step. The keys of all maps are request ids."""

    score: dict[str, ScoreStep] = field(default_factory=dict)
    compress: dict[str, CompressStep] = field(default_factory=dict)
    decode: dict[str, DecodeStep] = field(default_factory=dict)
    """Steps that add or change pages. In other compressed requests of the batch, the new token
    joins the last high record."""
    extend: dict[str, ExtendStep] = field(default_factory=dict)
    zero: tuple[int, ...] = ()
    """Pages that are set to zero at the beginning of the step."""
    stats: TierStats = field(default_factory=TierStats)


@dataclass
class TieredSchedulerOutput(SchedulerOutput):
    """vLLM's ``SchedulerOutput`` with the plan."""

    plan: StepPlan = field(default_factory=StepPlan)
