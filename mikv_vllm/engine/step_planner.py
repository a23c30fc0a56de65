"""Decides what each step does with the tiers, from the counts of its requests."""

from collections.abc import Mapping

from vllm.v1.request import Request

from mikv_vllm.engine.block_manager import TieredBlockManager
from mikv_vllm.engine.drafts import Drafts
from mikv_vllm.engine.step_plan import (
    CompressStep,
    DecodeStep,
    ExtendStep,
    ScoreStep,
    StepPlan,
)


class StepPlanner:
    """Plans scores, compressions and changes of blocks.

    A request is compressed in the step that computes the last token of its prompt. A request that
    is too short then is compressed in the decode step in which it first saves a page. A prompt
    longer than the manager's ``native_limit`` is compressed while it is computed.

    Args:
        manager: of the cache group that has tiers.
        max_model_len: most tokens of a request.
    """

    def __init__(self, manager: TieredBlockManager, max_model_len: int) -> None:
        self._manager = manager
        self._store = manager.store
        self._settings = manager.store.settings
        self._max_model_len = max_model_len
        self.drafts = Drafts(manager.store)
        self._scoring: set[str] = set()
        """Native requests that have scores."""

    def forget(self, request_id: str) -> None:
        """Forget a request that ended or was preempted."""
        self._scoring.discard(request_id)
        self.drafts.forget(request_id)

    def plan(
        self,
        requests: Mapping[str, Request],
        num_scheduled_tokens: Mapping[str, int],
        drafts: Mapping[str, list[int]],
    ) -> StepPlan:
        """Plan a step that vLLM has scheduled. The plan has no statistics yet.

        Args:
            drafts: the scheduled ones.
        """
        store = self._store
        decode: dict[str, DecodeStep] = {}
        extend: dict[str, ExtendStep] = {}
        for request_id, changes in store.changes.drain_steps().items():
            num_new = num_scheduled_tokens[request_id]
            if num_new == 1 or request_id in drafts:
                (decode[request_id],) = changes
            else:
                first = requests[request_id].num_computed_tokens - num_new
                extend[request_id] = ExtendStep(first, tuple(changes), self._queries(num_new))
        score: dict[str, ScoreStep] = {}
        compress: dict[str, CompressStep] = {}
        for request_id in [r for r in store.ratios if r not in store.requests]:
            num_new = num_scheduled_tokens.get(request_id, 0)
            if not num_new or request_id in drafts:
                continue  # rejected drafts must neither score nor be compressed
            request = requests[request_id]
            if scoring := self._score(request, num_new):
                score[request_id] = scoring
            num_tokens = request.num_computed_tokens
            if self._awaits_more_prompt(request) or num_tokens < self._settings.min_tokens:
                continue
            if done := self._manager.compress(request, num_tokens):
                compress[request_id] = done
                self._scoring.discard(request_id)
        store.seal(requests)
        store.changes.release_pages()
        return StepPlan(
            score=score,
            compress=compress,
            decode=decode,
            extend=extend,
            verified=self.drafts.begin_step(drafts),
            adopt=store.changes.drain_adopted(),
            copy=store.changes.drain_copies(),
            zero=store.dirty.drain(),
        )

    def cut_chunk(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """Return how many of ``num_new_tokens`` tokens vLLM should compute in this step.

        A step ends at a branch. The last queries before it, or of the whole prompt, are computed in
        one step, because they score it. A long prompt is computed natively up to ``native_limit``
        only.
        """
        request_id = request.request_id
        # vLLM adds drafts, or placeholders of them, to the last token that it computes.
        is_decode = num_computed_tokens + 1 >= request.num_tokens
        if is_decode or request_id not in self._store.ratios:
            return num_new_tokens
        limit, window = self._manager.native_limit(request_id), self._settings.window
        end = self._end(request, num_computed_tokens)
        is_tiered = request_id in self._store.requests or request_id in self._manager.hits
        if not is_tiered and end > limit:
            num_new_tokens = min(num_new_tokens, max(limit - num_computed_tokens, window))
        left = end - num_computed_tokens
        num_new_tokens = min(num_new_tokens, left)
        before_window = left - window
        is_cut = 0 < before_window < num_new_tokens < left
        return before_window if is_cut and self._settings.importance == "window" else num_new_tokens

    def _end(self, request: Request, num_computed_tokens: int) -> int:
        """Tokens with which the prompt is scored next: those up to its branch, or all."""
        branch = self._store.branches.get(request.request_id, 0)
        return branch if num_computed_tokens < branch else request.num_tokens

    def _awaits_more_prompt(self, request: Request) -> bool:
        """Whether more of the prompt is computed before the request is compressed."""
        request_id, num_tokens = request.request_id, request.num_computed_tokens
        if not request.is_prefill_chunk or num_tokens == self._store.branches.get(request_id):
            return False
        limit = self._manager.native_limit(request_id)
        # The window at a prompt's end is not cut: there has to be room for it.
        has_room = num_tokens < limit - self._settings.window
        return self._end(request, num_tokens) <= limit or has_room

    def _queries(self, num_new: int) -> int:
        """Number of queries of a step that score."""
        if self._settings.importance == "h2o":
            return num_new
        return min(self._settings.window, num_new)

    def _score(self, request: Request, num_new: int) -> ScoreStep | None:
        """Plan how this step adds to the scores of a native request; None if it does not."""
        num_tokens, settings = request.num_computed_tokens, self._settings
        if settings.importance == "h2o":
            reset = num_tokens == num_new
        else:
            least = settings.min_tokens - settings.window
            if self._awaits_more_prompt(request) or num_tokens < least:
                return None
            reset = num_new > 1 or request.request_id not in self._scoring
        self._scoring.add(request.request_id)
        capacity = min(request.num_prompt_tokens + request.max_tokens, self._max_model_len)
        return ScoreStep(self._queries(num_new), num_tokens, max(capacity, num_tokens), reset)
