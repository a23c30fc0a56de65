"""State of a worker process for the current step, which the attention backend reads."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from mikv_vllm.config import CompressionConfig
from mikv_vllm.engine.step_plan import StepPlan, TieredSchedulerOutput
from mikv_vllm.engine.tier_tables import TierTables

NO_SLOTS = np.empty(0, np.int64)


@dataclass
class WorkerContext:
    """State of one worker process. Only the worker writes to it.

    vLLM creates backends and metadata builders by class and cannot pass a plan to them, so they
    read it here.
    """

    compression: CompressionConfig | None = None
    plan: StepPlan = field(default_factory=StepPlan)
    request_ids: Callable[[], list[str]] = list
    """Request ids in the order of the batch, available after vLLM has built the batch."""
    tiers: TierTables = field(default_factory=TierTables)
    """Sizes and pages of the compressed requests."""
    decoded: np.ndarray = field(default_factory=lambda: NO_SLOTS)
    """Slots of the compressed requests that decode in this step, or did in the last one."""
    scores: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """Importance scores of native requests, by layer name: float32 ``[kv_heads, capacity]``."""

    _workspace: torch.Tensor | None = None
    _appended: np.ndarray = field(default_factory=lambda: NO_SLOTS)
    """Slots of the requests that a token and its drafts join in this step."""

    def workspace(self, cache: torch.Tensor, num_pages: int) -> torch.Tensor:
        """Return native pages outside of the pool, for one layer at a time.

        They are shaped like the pages of ``cache``. All numbers in them are finite, because vLLM's
        kernel multiplies slots without a token by 0.
        """
        if self._workspace is None or len(self._workspace) < num_pages:
            self._workspace = cache.new_zeros(num_pages, *cache.shape[1:])
        return self._workspace[:num_pages]

    @property
    def is_native(self) -> bool:
        """Whether the step reads and changes no tier. vLLM's own code then runs it."""
        plan = self.plan
        return not (len(self._appended) or plan.score or plan.compress or plan.extend)

    def begin_step(self, output: TieredSchedulerOutput) -> None:
        """Apply the changes of the plan to the tables. Call it before the model runs."""
        self.plan = plan = output.plan
        for request_id in output.finished_req_ids:
            self.scores.pop(request_id, None)
            self.tiers.discard(request_id)
        for request_id in output.preempted_req_ids or ():
            self.tiers.discard(request_id)
        for request_id, score in plan.score.items():
            if score.reset:
                self.scores[request_id] = {}
        for request_id, drafts in plan.verified.items():
            self.tiers.verify(request_id, drafts.accepted, drafts.rejected)
        for request_id, blocks in plan.adopt.items():
            self.tiers.add(request_id, blocks)
        for request_id, step in plan.decode.items():
            self.tiers.change(request_id, step)
        slots = self.tiers.slots(r for r in output.num_scheduled_tokens if r not in plan.extend)
        self.decoded = self._appended = slots[slots >= 0]

    def end_step(self) -> None:
        """Update the tables after a step. Call it after the model has run.

        Draft layers call it before their later passes. A second call changes nothing.
        """
        plan = self.plan
        self.tiers.end_step(self._appended)
        for request_id, change in plan.decode.items():
            if change.sealed:
                self.tiers.seal(request_id, change.sealed)
        for request_id, step in plan.extend.items():
            self.tiers.extend(request_id, step)
        for request_id, done in plan.compress.items():
            self.scores.pop(request_id, None)
            self.tiers.add(request_id, done.blocks)
        # A dummy step of data parallelism has no plan.
        self.plan, self._appended = StepPlan(stats=plan.stats), NO_SLOTS


context = WorkerContext()
