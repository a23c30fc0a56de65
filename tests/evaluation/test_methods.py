"""Methods that store a KV cache: their bytes, and the keys and values that they return."""

import pytest
import torch

from mikv_vllm.evaluation.methods import (
    BY_BITS,
    H2O,
    KIVI,
    Balanced,
    HeadCache,
    MiKV,
    PaperMiKV,
    PerToken,
    SnapKV,
    StreamingLLM,
    TurboQuant,
    every_method,
)
from mikv_vllm.evaluation.methods.turboquant import lloyd_max
from mikv_vllm.tiers import records, reference
from mikv_vllm.tiers.blocks import BlockPlanner
from mikv_vllm.tiers.formats import LADDERS, TierGeometry

TOKENS, HEAD_DIM = 500, 64
METHODS = every_method([2.0, 4.0])


def head_cache(tokens=TOKENS, head_dim=HEAD_DIM):
    """A random cache whose key channels differ in mean and range."""
    rng = torch.Generator().manual_seed(0)
    channels = torch.exp(torch.randn(head_dim, generator=rng))
    keys = torch.randn(tokens, head_dim, generator=rng) * channels + 3 * channels
    values = torch.randn(tokens, head_dim, generator=rng)
    queries = torch.randn(96, head_dim, generator=rng)
    attention = torch.rand(tokens, generator=rng)
    return HeadCache(keys, values, queries, queries.abs().amax(0), attention, attention.flip(0))


@pytest.fixture
def cache():
    return head_cache()


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.family}, {m.setting}")
def test_every_method_returns_finite_tensors_in_fewer_bytes(method, head_dim):
    cache = head_cache(head_dim=head_dim)
    before = [x.clone() for x in vars(cache).values()]
    stored = method.store(cache)
    assert stored.keys.shape == stored.values.shape
    assert stored.keys.shape[1] == head_dim
    assert 0 < len(stored.keys) <= TOKENS
    assert stored.keys.isfinite().all()
    assert stored.values.isfinite().all()
    assert 0 < stored.num_bytes < cache.native_bytes
    assert all(map(torch.equal, vars(cache).values(), before)), "the cache was modified"


@pytest.mark.parametrize(
    ("method", "token_bytes"),
    [
        (PerToken(4), 2 * (32 + 4)),
        (PerToken(2), 2 * (16 + 4)),
        (Balanced(4), 2 * (32 + 4) + 2 * 64 / TOKENS),
        (TurboQuant(3), 2 * (24 + 2)),
        (PaperMiKV(4, 16), 0.2 * 256 + 0.8 * 72 + 2 * 64 / TOKENS),
        (PaperMiKV(2, 8), 0.2 * (128 + 8) + 0.8 * 40 + 2 * 64 / TOKENS),
        (StreamingLLM(4), 64),
        (H2O(4), 64),
        (SnapKV(4), 64),
    ],
)
def test_metadata_is_counted(cache, method, token_bytes):
    assert method.store(cache).num_bytes == pytest.approx(TOKENS * token_bytes)


def test_kivi_leaves_tokens_that_do_not_fill_a_group_at_16_bits(cache):
    stored = KIVI(2).store(cache)
    rest = TOKENS % 32
    assert torch.equal(stored.keys[-rest:], cache.keys[-rest:])
    assert stored.num_bytes == pytest.approx((TOKENS - rest) * (16 + 8 + 16 + 8) + rest * 256)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("method", BY_BITS)
def test_more_bits_give_smaller_errors(cache, method, bits):
    coarse, fine = method(bits).store(cache), method(bits + 1).store(cache)
    for name in ("keys", "values"):
        exact = getattr(cache, name)
        errors = [(getattr(s, name) - exact).norm() for s in (coarse, fine)]
        assert errors[1] < 0.7 * errors[0]


def test_evictions_keep_the_tokens_that_their_papers_say(cache):
    kept = TOKENS // 4
    rows = {tuple(row.tolist()): i for i, row in enumerate(cache.keys)}

    def positions(method):
        return [rows[tuple(row.tolist())] for row in method.store(cache).keys]

    assert positions(StreamingLLM(4)) == [0, 1, 2, 3, *range(TOKENS - kept + 4, TOKENS)]
    heavy = positions(H2O(4))
    assert heavy[-(kept // 2) :] == list(range(TOKENS - kept // 2, TOKENS))
    older = cache.attention[: TOKENS - kept // 2].topk(kept - kept // 2).indices
    assert heavy[: -(kept // 2)] == sorted(older.tolist())
    snap = positions(SnapKV(4))
    assert snap[-32:] == list(range(TOKENS - 32, TOKENS))
    assert all(len(p) == kept for p in (heavy, snap))


def test_levels_match_the_published_ones():
    # Max (1960), table I.
    torch.testing.assert_close(
        lloyd_max(2), torch.tensor([-1.510, -0.4528, 0.4528, 1.510]), atol=2e-3, rtol=0
    )


@pytest.mark.parametrize("codec", LADDERS)
@pytest.mark.parametrize("ratio", [2.0, 4.0, 5.5])
def test_mikv_matches_the_bytes_of_the_oracle(cache, ratio, codec):
    geometry = TierGeometry(HEAD_DIM, 32)
    planner = BlockPlanner(geometry, ratio, 16, LADDERS[codec])
    (sizes,), low_format = planner.compress(TOKENS), planner.form(0).low_format
    pages = torch.zeros(sizes.pages, 1, geometry.page_bytes, dtype=torch.uint8)
    table = list(range(sizes.pages))
    reference.compress(
        pages,
        table,
        geometry,
        low_format,
        sizes,
        cache.keys[:, None],
        cache.values[:, None],
        cache.window_attention[None],
        cache.queries[:, None],
        16,
    )
    stream = records.Stream(pages, table, 0)
    keys, values, _ = records.read_high(stream, geometry, sizes.high_tokens, torch.float32)
    low_records = [
        records.read_low_record(
            stream,
            geometry,
            low_format,
            records.low_record_offset(geometry, low_format, sizes, record),
        )
        for record in range(sizes.low_records)
    ]
    stored = MiKV(ratio, codec=codec).store(cache)
    # A tail takes only the pages that its tiers touch.
    assert stored.num_bytes == planner.num_allocated(0, sizes) * geometry.page_bytes
    for mine, parts in (
        (stored.keys, [keys, *(k for k, _ in low_records)]),
        (stored.values, [values, *(v for _, v in low_records)]),
    ):
        torch.testing.assert_close(mine, torch.cat(parts), rtol=1e-4, atol=1e-4)


def test_names_of_methods_are_unique():
    assert len({(method.family, method.setting) for method in METHODS}) == len(METHODS)
