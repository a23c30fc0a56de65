"""Methods that store a KV cache: their bytes, and the keys and values that they return."""

from dataclasses import replace

import pytest
import torch

from mikv_vllm.evaluation.methods import (
    BY_BITS,
    H2O,
    KIVI,
    NVFP4,
    OSCAR,
    Balanced,
    BlockGTQ,
    HeadCache,
    Kitty,
    MiKV,
    OScaR,
    PaperMiKV,
    PerToken,
    SnapKV,
    StreamingLLM,
    TurboQuant,
    every_method,
)
from mikv_vllm.evaluation.methods.block_gtq import allocate
from mikv_vllm.evaluation.methods.quantization import quantize_per_token
from mikv_vllm.evaluation.methods.turboquant import lloyd_max, round_rotated
from mikv_vllm.tiers import records, reference
from mikv_vllm.tiers.blocks import BlockPlanner
from mikv_vllm.tiers.codec import rotate
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
    return HeadCache(keys, values, queries, queries.abs().amax(0), attention.flip(0), attention)


@pytest.fixture
def cache():
    return head_cache()


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.family}, {m.setting}")
def test_every_method_returns_finite_tensors_in_fewer_bytes(method, head_dim):
    cache = head_cache(head_dim=head_dim)
    if not method.reads_attention:
        cache = replace(cache, attention=None)
    tensors = [x for x in vars(cache).values() if x is not None]
    before = [x.clone() for x in tensors]
    stored = method.store(cache)
    assert stored.keys.shape == stored.values.shape
    assert stored.keys.shape[1] == head_dim
    assert 0 < len(stored.keys) <= TOKENS
    assert stored.keys.isfinite().all()
    assert stored.values.isfinite().all()
    assert 0 < stored.num_bytes < cache.native_bytes
    assert all(map(torch.equal, tensors, before)), "the cache was modified"


@pytest.mark.parametrize(
    ("method", "token_bytes"),
    [
        (PerToken(4), 2 * (32 + 4)),
        (PerToken(2), 2 * (16 + 4)),
        (Balanced(4), 2 * (32 + 4) + 2 * 64 / TOKENS),
        (TurboQuant(3), 2 * (24 + 2)),
        (PaperMiKV(4, 16), 0.2 * 256 + 0.8 * 72 + 2 * 64 / TOKENS),
        (PaperMiKV(2, 8), 0.2 * (128 + 8) + 0.8 * 40 + 2 * 64 / TOKENS),
        (OSCAR(2), (32 * 256 + (TOKENS - 32) * 2 * (16 + 4)) / TOKENS),
        (OScaR(2), (116 * 256 + 384 * (16 + 4 * 64 / 128 + 2 + 16 + 4)) / TOKENS),
        (Kitty(1 / 8), (116 * 256 + 384 * (16 + 2 + 64 * 4.125 / 128 + 16 + 4)) / TOKENS),
        (NVFP4(), 2 * (32 + 4)),
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


def test_kitty_boosts_the_channels_with_the_largest_magnitude(cache):
    exact, boosted = cache.keys[32:160], Kitty(1 / 4).store(cache).keys[32:160]
    plain = Kitty(0.0).store(cache).keys[32:160]
    largest = exact.abs().mean(0).topk(16).indices
    others = [i for i in range(HEAD_DIM) if i not in largest.tolist()]
    assert torch.equal(boosted[:, others], plain[:, others])
    error, plain_error = ((k - exact)[:, largest].norm() for k in (boosted, plain))
    assert error < 0.3 * plain_error
    assert torch.equal(Kitty(1 / 4).store(cache).keys[:32], cache.keys[:32])


def test_oscar_keeps_the_products_with_queries_better_than_a_hadamard_rotation(cache):
    """Queries in a few directions: the error of the keys may be in the other ones."""
    rng = torch.Generator().manual_seed(2)
    mixing = torch.linalg.qr(torch.randn(HEAD_DIM, HEAD_DIM, generator=rng)).Q
    queries = (cache.queries * torch.linspace(4, 0.1, HEAD_DIM)) @ mixing
    skewed = replace(cache, queries=queries)
    oscar = OSCAR(2).store(skewed).keys
    hadamard = rotate(quantize_per_token(rotate(cache.keys), 2))
    errors = [((keys - cache.keys) @ queries.T).norm() for keys in (oscar, hadamard)]
    assert errors[0] < errors[1]


def test_oscar_scales_tokens_of_different_norms(cache):
    """A token with a hundredth of the norm has a hundredth of the error."""
    keys = cache.keys.clone()
    keys[7] /= 100
    error = (OScaR(2).store(replace(cache, keys=keys)).keys - keys).norm(dim=1)
    assert error[7] < 0.05 * error[8:20].mean()


def test_block_gtq_gives_bits_to_energy():
    energy = torch.tensor([64.0, 16.0, 1.0, 1.0])
    assert allocate(energy, 2).tolist() == [4, 3, 1, 0]
    assert allocate(torch.ones(8), 3).tolist() == [3] * 8
    assert allocate(torch.tensor([1e9, 1.0]), 5).tolist() == [8, 2]


def test_block_gtq_with_equal_energies_is_as_good_as_turboquant():
    rng = torch.Generator().manual_seed(1)
    keys, values, queries = (torch.randn(TOKENS, HEAD_DIM, generator=rng) for _ in range(3))
    weights = torch.ones(TOKENS)
    cache = HeadCache(keys, values, queries, queries.abs().amax(0), weights, weights)
    error = float((BlockGTQ(3).store(cache).keys - keys).norm())
    assert error == pytest.approx(float((round_rotated(keys, 3) - keys).norm()), rel=0.05)


def test_nvfp4_represents_its_levels():
    keys = torch.tensor([[0.0, 0.5, -1.0, 1.5, 2.0, -3.0, 4.0, 6.0] * 8])
    cache = replace(head_cache(tokens=1), keys=keys, values=2 * keys)
    stored = NVFP4().store(cache)
    assert torch.equal(stored.keys, keys)
    assert torch.equal(stored.values, 2 * keys)


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
    (block,) = planner.compress(TOKENS)
    sizes, low_format = block.sizes, block.low_format
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
    assert stored.num_bytes == sizes.pages * geometry.page_bytes
    for mine, parts in (
        (stored.keys, [keys, *(k for k, _ in low_records)]),
        (stored.values, [values, *(v for _, v in low_records)]),
    ):
        torch.testing.assert_close(mine, torch.cat(parts), rtol=1e-4, atol=1e-4)


def test_names_of_methods_are_unique():
    assert len({(method.family, method.setting) for method in METHODS}) == len(METHODS)
