"""Ways to store a cache: their bytes, and what they give back."""

import pytest
import torch

from mikv_vllm.evaluation.methods import (
    Balanced,
    HeadCache,
    HeavyHitters,
    MiKV,
    PaperMiKV,
    PerChannelKeys,
    PerToken,
    Recent,
    RotatedLloydMax,
    SnapKV,
    every_method,
)
from mikv_vllm.evaluation.methods.uniform import lloyd_max
from mikv_vllm.tiers import records, reference
from mikv_vllm.tiers.formats import LADDERS, TierGeometry
from mikv_vllm.tiers.plan import TierPlanner

TOKENS, HEAD_DIM = 500, 64


@pytest.fixture
def cache():
    rng = torch.Generator().manual_seed(0)
    channels = torch.exp(torch.randn(HEAD_DIM, generator=rng))
    keys = torch.randn(TOKENS, HEAD_DIM, generator=rng) * channels + 3 * channels
    values = torch.randn(TOKENS, HEAD_DIM, generator=rng)
    queries = torch.randn(96, HEAD_DIM, generator=rng)
    attention = torch.rand(TOKENS, generator=rng)
    return HeadCache(keys, values, queries, queries.abs().amax(0), attention, attention.flip(0))


@pytest.mark.parametrize(
    ("method", "token_bytes"),
    [
        (PerToken(4), 2 * (32 + 4)),
        (PerToken(2), 2 * (16 + 4)),
        (Balanced(4), 2 * (32 + 4) + 2 * 64 / TOKENS),
        (RotatedLloydMax(3), 2 * (24 + 2)),
        (PaperMiKV(4, 16), 0.2 * 256 + 0.8 * 72 + 2 * 64 / TOKENS),
        (PaperMiKV(2, 8), 0.2 * (128 + 8) + 0.8 * 40 + 2 * 64 / TOKENS),
        (Recent(4), 64),
        (HeavyHitters(4), 64),
        (SnapKV(4), 64),
    ],
)
def test_every_byte_is_counted(cache, method, token_bytes):
    assert method.store(cache).num_bytes == pytest.approx(TOKENS * token_bytes)


def test_keys_per_channel_leave_a_rest_uncompressed(cache):
    stored = PerChannelKeys(2).store(cache)
    rest = TOKENS % 32
    assert torch.equal(stored.keys[-rest:], cache.keys[-rest:])
    assert stored.num_bytes == pytest.approx((TOKENS - rest) * (16 + 8 + 16 + 8) + rest * 256)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_more_bits_are_closer(cache, bits):
    for method in (PerToken, Balanced, PerChannelKeys, RotatedLloydMax):
        coarse, fine = method(bits).store(cache), method(bits + 1).store(cache)
        for name in ("keys", "values"):
            exact = getattr(cache, name)
            errors = [(getattr(s, name) - exact).norm() for s in (coarse, fine)]
            assert errors[1] < 0.7 * errors[0]


def test_evictions_keep_what_they_promise(cache):
    kept = TOKENS // 4
    rows = {tuple(row.tolist()): i for i, row in enumerate(cache.keys)}

    def positions(method):
        return [rows[tuple(row.tolist())] for row in method.store(cache).keys]

    assert positions(Recent(4)) == [0, 1, 2, 3, *range(TOKENS - kept + 4, TOKENS)]
    heavy = positions(HeavyHitters(4))
    assert heavy[-(kept // 2) :] == list(range(TOKENS - kept // 2, TOKENS))
    older = cache.attention[: TOKENS - kept // 2].topk(kept - kept // 2).indices
    assert heavy[: -(kept // 2)] == sorted(older.tolist())
    snap = positions(SnapKV(4))
    assert snap[-32:] == list(range(TOKENS - 32, TOKENS))
    assert all(len(p) == kept for p in (heavy, snap))


def test_levels_are_those_of_a_normal_number():
    # Max (1960), table I.
    torch.testing.assert_close(
        lloyd_max(2), torch.tensor([-1.510, -0.4528, 0.4528, 1.510]), atol=2e-3, rtol=0
    )


@pytest.mark.parametrize("codec", LADDERS)
@pytest.mark.parametrize("ratio", [2.0, 4.0, 5.5])
def test_ours_is_what_the_oracle_writes(cache, ratio, codec):
    geometry = TierGeometry(HEAD_DIM, 32)
    planner = TierPlanner.choose(geometry, ratio, 16, TOKENS, LADDERS[codec])
    state = planner.compress(TOKENS)
    pages = torch.zeros(state.pages, 1, geometry.page_bytes, dtype=torch.uint8)
    table = list(range(state.pages))
    reference.compress(
        pages,
        table,
        geometry,
        planner.low_format,
        state,
        cache.keys[:, None],
        cache.values[:, None],
        cache.window_attention[None],
        cache.queries[:, None],
        16,
    )
    stream = records.Stream(pages, table, 0)
    keys, values, _ = records.read_high(stream, geometry, state.high_tokens, torch.float32)
    chunks = [
        records.read_low_record(
            stream,
            geometry,
            planner.low_format,
            records.low_record_offset(geometry, planner.low_format, state, chunk),
        )
        for chunk in range(state.low_records)
    ]
    stored = MiKV(ratio, codec=codec).store(cache)
    assert stored.num_bytes == pages.numel()
    for mine, parts in (
        (stored.keys, [keys, *(k for k, _ in chunks)]),
        (stored.values, [values, *(v for _, v in chunks)]),
    ):
        torch.testing.assert_close(mine, torch.cat(parts), rtol=1e-4, atol=1e-4)


def test_every_method_has_a_name_of_its_own():
    methods = every_method([2.0, 4.0])
    names = {(method.family, method.setting) for method in methods}
    assert len(names) == len(methods)
