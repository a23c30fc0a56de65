"""What the worker process knows of the current step, for the attention backend to use."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from mikv_vllm.config import CompressionConfig
from mikv_vllm.engine.step_plan import StepPlan, TieredSchedulerOutput


@dataclass
class WorkerContext:
    """State of one worker process; its only writer is the worker.

    vLLM builds backends and metadata builders by class, with no way to hand them a plan, so
    they look here.
    """

    compression: CompressionConfig | None = None
    plan: StepPlan = field(default_factory=StepPlan)
    request_ids: Callable[[], list[str]] = list
    """Request ids in batch order, once vLLM has laid out the step's batch."""
    tables: dict[str, list[int]] = field(default_factory=dict)
    """Block table of each tiered request: page ids in stream order."""
    scores: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """Importance scores of native requests, by layer name: float32 ``[kv_heads, capacity]``."""

    _workspace: torch.Tensor | None = None

    def workspace(self, cache: torch.Tensor, num_pages: int) -> torch.Tensor:
        """Native pages outside of the pool, like those of ``cache``, for one layer at a time.

        Their bytes are finite: vLLM's kernel multiplies unwritten slots by 0.
        """
        if self._workspace is None or len(self._workspace) < num_pages:
            self._workspace = cache.new_zeros(num_pages, *cache.shape[1:])
        return self._workspace[:num_pages]

    def begin_step(self, output: TieredSchedulerOutput) -> None:
        """Apply the plan's changes to the tables; called before the model runs."""
        self.plan = plan = output.plan
        for request_id in output.finished_req_ids:
            self.tables.pop(request_id, None)
            self.scores.pop(request_id, None)
        for request_id, score in plan.score.items():
            if score.reset:
                self.scores[request_id] = {}
        for request_id, step in (plan.decode | plan.extend).items():
            self.tables[request_id].extend(step.new_pages)
        for request_id, compress in plan.compress.items():
            self.tables[request_id] = list(compress.tiered_pages)

    def end_step(self) -> None:
        """Drop the scores of requests that this step compressed."""
        for request_id in self.plan.compress:
            self.scores.pop(request_id, None)


context = WorkerContext()
