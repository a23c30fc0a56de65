"""Restoring and extending a compressed request in Triton, compared with the torch oracle."""

import pytest
import torch

from mikv_vllm.tiers import records, reference
from mikv_vllm.tiers.blocks import BlockPlanner
from mikv_vllm.tiers.formats import LowFormat

from .seals import SEALS, check_seal
from .tiered_cache import (
    Shape,
    assert_same_tiers,
    filled,
    insert_pages,
    new_pages,
    sizes_of,
    tokens,
)
from .triton_layer import RECENT, layer

CASES = [
    (Shape(), LowFormat((5, 3, 2, 2), 3), 40, 4),
    (Shape(64, block_size=16, queries_per_kv_head=1), LowFormat((6, 5, 5, 4), 4), 16, 3),
    (Shape(80, block_size=32, dtype=torch.float16), LowFormat((5, 5, 4, 2), 5), 47, 6),
    (Shape(96, block_size=32), LowFormat((6, 4, 3, 3), 2), 33, 3),
    (Shape(112, kv_heads=1), LowFormat((6, 6, 4, 3), 3), 30, 2),
    (Shape(128, block_size=128), LowFormat((4, 2, 2, 2), 2), 64, 5),
    (Shape(128, high_bits=16), LowFormat((2, 2, 2, 2), 4), 20, 2),
    (Shape(96, block_size=32), LowFormat((3, 2, 1, 1), 2), 35, 2),
    (Shape(256, kv_heads=1, block_size=16), LowFormat((6, 6, 3, 2), 3), 17, 2),
    (Shape(64, high_bits=16), LowFormat((6, 4, 3, 3), 4), 130, 0),
    (Shape(), LowFormat.parse("B3V3"), 40, 4),
    (Shape(80, block_size=32, dtype=torch.float16), LowFormat.parse("B5V5"), 47, 2),
    (Shape(128, kv_heads=1, high_bits=16), LowFormat.parse("B2V2"), 20, 2),
]


def on(device, table):
    return torch.tensor(table, dtype=torch.int32, device=device)


@pytest.mark.parametrize(("shape", "low_format", "high", "low_records"), CASES)
def test_restored_pages_hold_both_tiers(shape, low_format, high, low_records, device):
    sizes = sizes_of(shape, low_format, high, low_records, slack_lines=3)
    pages = new_pages(shape, sizes.pages + 2, poison=None)
    table = torch.randperm(len(pages))[: sizes.pages].tolist()
    filled(shape, low_format, sizes, pages, table, seed=high, recent=RECENT)
    count = -(-sizes.num_tokens // shape.block_size)
    # Every second page of a larger tensor: the page stride does not follow from the token stride.
    size = (2 * count, shape.block_size, shape.kv_heads, 2 * shape.head_dim)
    native = torch.full(size, 7.0, dtype=shape.dtype).to(device)[::2]
    ops = layer(shape, device)
    args = (pages.to(device), on(device, table), sizes, low_format)
    ops.restore(*args, native.transpose(1, 2))
    restored = native.cpu().unflatten(-1, (2, -1)).movedim(3, 0).flatten(1, 2)
    assert (restored[:, sizes.num_tokens :] == 7.0).all()
    for head in range(shape.kv_heads):
        stream = records.Stream(pages, table, head)
        expected = reference.restore(stream, shape.geometry, low_format, sizes, shape.dtype)
        for stored, numbers in zip(restored[:, : sizes.num_tokens, head], expected, strict=True):
            # The interpreter truncates to bf16.
            torch.testing.assert_close(stored.float(), numbers, rtol=2**-7, atol=1e-5)


STEPS = [
    (
        Shape(64, block_size=16, queries_per_kv_head=1),
        LowFormat((5, 3, 3, 2), 3),
        3.0,
        170,
        90,
        1.0,
    ),
    (Shape(64, block_size=16), LowFormat((5, 3, 3, 2), 3), 3.0, 130, 125, 0.0),
    (Shape(64, block_size=16), LowFormat((5, 3, 3, 2), 3), 2.2, 60, 90, 1.0),
    (Shape(64, block_size=16), LowFormat((5, 3, 3, 2), 3), 1.6, 60, 33, 1.0),
    (Shape(64, block_size=16), LowFormat.parse("B3V3"), 2.2, 190, 5, 0.0),
    (Shape(80, block_size=32, dtype=torch.float16), LowFormat((6, 5, 5, 4), 4), 3.0, 300, 17, 0.0),
    (Shape(96, block_size=32), LowFormat.parse("B3V3"), 4.0, 300, 40, 1.0),
    (Shape(112, kv_heads=1, block_size=16), LowFormat((6, 4, 3, 3), 5), 3.0, 200, 1, 0.0),
    (Shape(128, high_bits=16), LowFormat((4, 2, 2, 2), 4), 4.0, 400, 100, 1.0),
    (Shape(128, block_size=16, high_bits=16), LowFormat.parse("B2V4"), 3.0, 150, 75, 0.0),
    (Shape(256, kv_heads=1, block_size=16), LowFormat((4, 3, 2, 2), 2), 5.0, 350, 64, 1.0),
]


@pytest.mark.parametrize(("shape", "low_format", "ratio", "first", "more", "keep"), STEPS)
def test_extend_writes_the_oracles_bytes(shape, low_format, ratio, first, more, keep, device):
    planner = BlockPlanner(shape.geometry, ratio, RECENT, (low_format,))
    sizes = planner.tail(0, first)
    step = planner.extend(0, sizes, more)
    sizes = planner.lengthen(sizes, step.after.pages)
    pages, table, _ = compressed(shape, low_format, sizes)
    check_extend(
        layer(shape, device), shape, low_format, sizes, step, pages, table, more, keep, device
    )


def test_a_prompt_chunk_by_chunk(device):
    shape = Shape(64, kv_heads=1, block_size=16)
    planner = BlockPlanner(shape.geometry, 4.0, RECENT)
    sizes, low_format = planner.tail(0, 100), planner.tail_form(0).low_format
    pages, table, free = compressed(shape, low_format, sizes, spare=20)
    ops = layer(shape, device)
    for more in (60, 1, 33, 16, 150, 40):
        step = planner.extend(0, sizes, more)
        insert_pages(pages, table, free, step)
        sizes = planner.lengthen(sizes, step.after.pages)
        check_extend(ops, shape, low_format, sizes, step, pages, table, more, 1.0, device)
        sizes = step.after
    assert sizes.num_tokens == 400


def compressed(shape, low_format, sizes, spare=3):
    """Pages with a compressed block, its block table, and the other pages."""
    pages = new_pages(shape, sizes.pages + spare, poison=None)
    free = torch.randperm(len(pages)).tolist()
    table = [free.pop() for _ in range(sizes.pages)]
    filled(shape, low_format, sizes, pages, table, seed=sizes.pages, recent=RECENT)
    return pages, table, free


def check_extend(ops, shape, low_format, sizes, step, pages, table, more, keep, device):
    """Extend the request in ``pages`` by ``more`` tokens, and compare with the oracle."""
    keys, values = tokens(shape, more + 2, seed=more)
    scores = torch.rand(shape.kv_heads, sizes.num_tokens + more + 3)
    scores[:, sizes.num_tokens : sizes.num_tokens + more // 2] = 0.5  # ties
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
            scores[head, : sizes.num_tokens + more],
            keep,
            RECENT,
        )
        assert after == step.after
    on_device = pages.to(device)
    k, v = (part[1 : more + 1].to(device) for part in (keys, values))
    args = (on(device, table), sizes, step, low_format, k, v, scores.to(device), RECENT, keep)
    ops.extend(on_device, *args)
    pages.copy_(on_device)
    assert_same_tiers(pages, expected, table, shape, low_format, step.after)
    for head in range(shape.kv_heads):
        # High tokens are not rotated, so they are equal.
        ours, theirs = (
            records.read_high(
                records.Stream(part, table, head),
                shape.geometry,
                step.after.high_tokens,
                shape.dtype,
            )
            for part in (pages, expected)
        )
        assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
    others = [page for page in range(len(pages)) if page not in table[: step.after.pages]]
    assert torch.equal(pages[others], before[others])


@pytest.mark.parametrize(("shape", "tail", "high", "low", "block", "low_after"), SEALS)
def test_a_sealed_tail_has_the_oracles_bytes(shape, tail, high, low, block, low_after, device):
    ops = layer(shape, device)
    check_seal(ops, shape, tail, high, low, block, low_after, lambda tensor: tensor.to(device))
