"""The simulation notices mistakes in the prefix cache of blocks."""

from hashlib import sha256

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from mikv_vllm.engine import block_cache
from mikv_vllm.engine.block_cache import BlockCache
from mikv_vllm.engine.tier_store import TierStore
from mikv_vllm.engine.tiered_request import Block, TieredRequest

from .loads import DEPTH, NUM_PAGES, REQUESTS, Configs, run_load
from .simulation import Simulation


def hash_without_salt(patch) -> None:
    """Blocks are found by their tokens alone, whatever the salt and the adapter."""

    def tokens_hash(self, request, num_tokens):
        known = num_tokens // self._pool.hash_block_size <= len(request.block_hashes)
        tokens = str(request.all_token_ids[:num_tokens])
        return sha256(tokens.encode()).digest() if known else None

    patch.setattr(BlockCache, "_hash", tokens_hash)


def hash_without_sizes(patch) -> None:
    """Blocks are found whatever their form."""

    patch.setattr(block_cache, "is_richer", lambda block, planner: True)


def roll_back_one_token_too_many(patch) -> None:
    """One token more than those that are surely high is removed by count."""
    droppable = TieredRequest.droppable.fget
    patch.setattr(TieredRequest, "droppable", property(lambda self: droppable(self) + 1))


def roll_back_one_token_too_few(patch) -> None:
    """A tail keeps the first token that differs."""
    common_tokens = BlockCache._common_tokens

    def one_more(self, request, first_token, tail):
        common = common_tokens(self, request, first_token, tail)
        most = min(len(tail.tokens), request.num_tokens - 1 - first_token)
        return min(most, common + 1)

    patch.setattr(BlockCache, "_common_tokens", one_more)


def lost_pages_are_served(patch) -> None:
    """A block is found although one of its pages was allocated again."""
    patch.setattr(Block, "is_cached", property(lambda self: self.tag is not None))
    # It compares with ``is_cached`` itself.
    patch.setattr(Simulation, "check_kept_blocks", lambda self: None)


def share_tails(patch) -> None:
    """A request begins with the pages of a kept tail, not with a copy."""

    def adopt(self, request_id, hit):
        self.pool.touch(hit.pages)
        blocks = hit.blocks()
        if hit.tail:
            blocks[-1].pages = list(hit.tail.pages)
        droppable = hit.droppable if hit.tail else None
        tiered = TieredRequest(
            self.planner(request_id),
            blocks,
            hit.num_tokens,
            self.branches.get(request_id, 0),
            droppable,
        )
        self._hold(request_id, tiered, "adopt")
        self.changes.adopted[request_id] = tuple(block.table() for block in blocks)

    patch.setattr(TierStore, "adopt", adopt)


MUTATIONS = {
    hash_without_salt: "other tokens",
    hash_without_sizes: "poorer block",
    roll_back_one_token_too_many: "may be low",
    roll_back_one_token_too_few: "other tokens",
    lost_pages_are_served: (
        "mixed|overwritten|other tokens|no tail was copied|others hold|holders|tail is shared"
        "|page was zeroed"
    ),
    share_tails: "tail is shared|others hold|in the prefix cache was written",
}
"""What the simulation says to each of them."""


@pytest.fixture(scope="module")
def vllm_configs(tmp_path_factory):
    return Configs(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_a_mistake_is_noticed(vllm_configs, monkeypatch, mutate):
    mutate(monkeypatch)

    @settings(
        max_examples=500,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(requests=REQUESTS, num_pages=NUM_PAGES, depth=DEPTH)
    def run(requests, num_pages, depth):
        run_load(vllm_configs, "window", requests, num_pages, depth)

    with pytest.raises(AssertionError, match=MUTATIONS[mutate]):
        run()
