"""Adding the next chunk of a prompt to its tiers on the CPU, compared with the torch oracle."""

import pytest
import torch

from mikv_vllm.tiers import records, reference
from mikv_vllm.tiers.blocks import BlockPlanner
from mikv_vllm.tiers.formats import LowFormat

from .cpu_layer import RECENT, layer
from .seals import SEALS, check_seal
from .tiered_cache import Shape, assert_same_tiers, filled, new_pages, permutation, tokens

pytestmark = pytest.mark.usefixtures("isa")

CASES = [
    (Shape(), LowFormat((6, 4, 3, 3), 3), 4.0, 700, 130, None),
    (Shape(64, block_size=32, queries_per_kv_head=1), LowFormat((5, 3, 3, 2), 3), 4.5, 500, 333, 1),
    (Shape(80, block_size=32, dtype=torch.float16), LowFormat((6, 5, 5, 4), 4), 3.0, 300, 17, 2),
    (Shape(128, high_bits=16), LowFormat((4, 2, 2, 2), 4), 4.0, 400, 100, 3),
    (Shape(128, block_size=16), LowFormat((3, 2, 2, 1), 2), 5.0, 350, 64, None),
    (Shape(256, kv_heads=1, block_size=16), LowFormat((4, 3, 2, 2), 2), 5.0, 350, 64, None),
    (Shape(96, block_size=32), LowFormat.parse("B3V3"), 4.0, 300, 40, None),
]


def compressed(shape, low_format, ratio, first, more):
    """A compressed request of ``first`` tokens, with pages for ``more`` tokens after it."""
    planner = BlockPlanner(shape.geometry, ratio, RECENT, (low_format,))
    sizes = planner.tail(0, first)
    step = planner.extend(0, sizes, more)
    sizes = planner.lengthen(sizes, step.after.pages)
    pages = new_pages(shape, sizes.pages + 3, poison=None)
    table = torch.randperm(len(pages))[: sizes.pages].tolist()
    filled(shape, low_format, sizes, pages, table, seed=first, recent=RECENT)
    return sizes, step, pages, table


@pytest.mark.parametrize(("shape", "low_format", "ratio", "first", "more", "order"), CASES)
def test_restored_pages_hold_both_tiers(shape, low_format, ratio, first, more, order):
    index = permutation(shape, order)
    sizes, _, pages, table = compressed(shape, low_format, ratio, first, more)
    count = -(-first // shape.block_size)
    native = new_pages(shape, count)
    layer(shape, index).restore(pages, table, sizes, low_format, native)
    elements = native.view(shape.dtype)
    for head in range(shape.kv_heads):
        stream = records.Stream(pages, table, head)
        expected = reference.restore(stream, shape.geometry, low_format, sizes, shape.dtype)
        for places, values in zip(index, expected, strict=True):
            stored = elements[:, head, places.long()].reshape(-1, shape.head_dim)[:first]
            # Rotations may differ in their last bit.
            torch.testing.assert_close(stored.float(), values, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("keep", [0.0, 1.0])
@pytest.mark.parametrize(("shape", "low_format", "ratio", "first", "more", "order"), CASES)
def test_extend_writes_the_oracles_bytes(shape, low_format, ratio, first, more, order, keep):
    sizes, step, pages, table = compressed(shape, low_format, ratio, first, more)
    keys, values = tokens(shape, more + 2, seed=more)
    scores = torch.rand(shape.kv_heads, first + more)
    scores[:, first : first + more // 2] = 0.5  # ties
    expected, before = pages.clone(), pages.clone()
    for head in range(shape.kv_heads):
        after = reference.extend(
            records.Stream(expected, table, head),
            shape.geometry,
            low_format,
            sizes,
            step,
            keys[1 : more + 1, head],
            values[1 : more + 1, head],
            scores[head],
            keep,
            RECENT,
        )
        assert after == step.after
    k, v = keys[1 : more + 1], values[1 : more + 1]
    ops = layer(shape, permutation(shape, order))
    ops.extend(pages, table, sizes, step, low_format, k, v, scores, RECENT, keep)
    assert_same_tiers(pages, expected, table, shape, low_format, step.after)
    others = [page for page in range(len(pages)) if page not in table]
    assert torch.equal(pages[others], before[others])


@pytest.mark.parametrize("order", [None, 1])
@pytest.mark.parametrize(("shape", "tail", "high", "low", "block", "low_after"), SEALS)
def test_a_sealed_tail_has_the_oracles_bytes(shape, tail, high, low, block, low_after, order):
    ops = layer(shape, permutation(shape, order))
    check_seal(ops, shape, tail, high, low, block, low_after, lambda tensor: tensor.clone())
