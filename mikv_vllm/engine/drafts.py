"""Drafts of speculative decoding in the tails of compressed requests.

Drafts join the high tier of a tail with the token before them. Rejected ones leave it when the
tokens of the step are known, before anything is demoted or sealed. So the tiers of accepted tokens
are those that the request would have without drafts.
"""

from collections.abc import Iterable, Mapping

from vllm.v1.request import Request

from mikv_vllm.engine.step_plan import VerifiedDrafts
from mikv_vllm.engine.tier_store import TierStore


class Drafts:
    """Decides which drafts join, and removes rejected ones.

    Args:
        store: blocks of the compressed requests.
    """

    def __init__(self, store: TierStore) -> None:
        self._store = store
        self._in_flight: dict[str, int] = {}
        """Drafts in the last step of a request, until its tokens are known."""
        self._verified: dict[str, VerifiedDrafts] = {}

    def allow(self, requests: Iterable[Request]) -> None:
        """Remove the drafts that cannot join in the next step. Call it before vLLM schedules.

        A native request takes none when it is about to be scored and compressed: the queries of
        rejected drafts must not score.
        """
        store = self._store
        for request in requests:
            request_id, drafts = request.request_id, request.spec_token_ids
            if not drafts or request_id not in store.ratios:
                continue
            if tiered := store.requests.get(request_id):
                most = tiered.allow_drafts(len(drafts))
            else:
                least = store.settings.min_tokens - store.settings.window
                is_early = request.num_tokens + len(drafts) < least
                most = len(drafts) if is_early and store.settings.importance == "window" else 0
            request.spec_token_ids = drafts[:most]

    def begin_step(self, drafts: Mapping[str, list[int]]) -> dict[str, VerifiedDrafts]:
        """Remember the drafts of a step that vLLM has scheduled.

        Returns:
            What became of the drafts of earlier steps, as far as it is known since the last call.
        """
        for request_id, tokens in drafts.items():
            if request_id in self._store.requests:
                self._in_flight[request_id] = len(tokens)
        verified, self._verified = self._verified, {}
        return verified

    def verify(self, request: Request) -> None:
        """Remove the drafts of a request's last step that were rejected.

        Call it when the tokens of the step are known, or when the request ends.
        """
        request_id = request.request_id
        drafts = self._in_flight.pop(request_id, 0)
        if not drafts:
            return
        # Without drafts the last token of a request is never computed.
        num_tokens = min(request.num_computed_tokens, request.num_tokens - 1)
        rejected = min(drafts, self._store.requests[request_id].num_tokens - num_tokens)
        assert rejected >= 0, f"{request_id} has lost {-rejected} tokens"
        if rejected:
            self._store.remove_tokens(request_id, rejected)
        self._verified[request_id] = VerifiedDrafts(drafts - rejected, rejected)

    def forget(self, request_id: str) -> None:
        """Forget a request that ended or was preempted."""
        self._in_flight.pop(request_id, None)
        self._verified.pop(request_id, None)
