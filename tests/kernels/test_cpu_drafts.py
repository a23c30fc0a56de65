"""Decode steps with drafts on the CPU, compared with the same tokens one by one."""

import pytest
import torch

from mikv_vllm.kernels import cpu
from mikv_vllm.kernels.batch import ACCEPTED, BLOCKS, SLOT
from mikv_vllm.tiers.blocks import TailStep
from mikv_vllm.tiers.formats import LowFormat
from mikv_vllm.tiers.plan import TierSizes

from .cpu_layer import layer
from .tiered_cache import Shape, filled, live_bytes, new_pages, read_tiers, sizes_of

pytestmark = pytest.mark.usefixtures("isa")

LOW = LowFormat((5, 3, 2, 2), 3)
ROOM = 24
"""High tokens that every tail has room for."""
REQUESTS = [
    # Sealed blocks, and the tail: high tokens and low records of each.
    ([(48, 14), (32, 15)], (110, 3)),
    ([], (30, 2)),
    ([(100, 10)], (15, 0)),
]


class Requests:
    """Requests in a cache, whose tails take tokens."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.pages = new_pages(shape, 400)
        free = torch.randperm(len(self.pages)).tolist()
        self.blocks, self.tables = [], []
        for index, (sealed, tail) in enumerate(REQUESTS):
            self.blocks.append([])
            self.tables.append([])
            for i, (high, low) in enumerate([*sealed, tail]):
                room = sizes_of(shape, LOW, high + ROOM, low)
                sizes = TierSizes(room.pages, high, low, room.low_end_bytes)
                self.blocks[-1].append(sizes)
                self.tables[-1].append([free.pop() for _ in range(room.pages)])
                filled(shape, LOW, sizes, self.pages, self.tables[-1][-1], 7 * index + i, recent=0)

    def rows(self, counts: list[int], demotes: list[int]) -> list:
        """The rows of a step in which ``counts`` tokens join each request."""
        rows, token = [], 0
        for blocks, tables, count, demoted in zip(
            self.blocks, self.tables, counts, demotes, strict=True
        ):
            for sizes, table in zip(blocks[:-1], tables, strict=False):
                rows.append((token, table, sizes, TailStep(0, (), False, 0, sizes), LOW))
            tail = blocks[-1]
            high = tail.high_tokens + count - 32 * demoted
            after = TierSizes(tail.pages, high, tail.low_records + demoted, tail.low_end_bytes)
            step = TailStep(count, (), False, demoted, after)
            rows.append((token, tables[-1], tail, step, LOW))
            blocks[-1] = after
            token += count
        return rows

    def reject(self, index: int, count: int) -> None:
        """The newest tokens of a tail leave it."""
        tail = self.blocks[index][-1]
        high = tail.high_tokens - count
        self.blocks[index][-1] = TierSizes(tail.pages, high, tail.low_records, tail.low_end_bytes)


def run(ops, requests, tokens, counts, demotes, accepted=(0, 0, 0)) -> list[torch.Tensor]:
    """Run a step and return the output of each request.

    Args:
        tokens: q, k and v of each request, ``[count, heads, head_dim]``.
    """
    batch = cpu.DecodeBatch.build(requests.rows(counts, demotes))
    tails = batch.rows[:, BLOCKS] > 0
    batch.rows[tails, ACCEPTED], batch.rows[tails, SLOT] = accepted, [2, 0, 1]
    batch = cpu.DecodeBatch.of(batch.rows, batch.tables)
    q, k, v = (torch.cat(part) for part in zip(*tokens, strict=True))
    out = torch.full_like(q, 7.0)
    ops.decode(requests.pages, batch, q, k, v, out)
    return list(out.split(counts))


@pytest.mark.parametrize(
    ("shape", "kwargs"),
    [
        (Shape(block_size=32), {}),
        (Shape(64, queries_per_kv_head=8, kv_heads=1, dtype=torch.float16), {"sinks": True}),
        (Shape(128, queries_per_kv_head=6, kv_heads=1, high_bits=16), {"softcap": 8.0}),
    ],
)
def test_drafts_are_the_tokens_that_follow(shape, kwargs, threads):
    if kwargs.get("sinks"):
        kwargs = {"sinks": 2 * torch.randn(shape.heads)}
    torch.manual_seed(1)
    single = Requests(shape)
    torch.manual_seed(1)
    drafted = Requests(shape)
    one_by_one, at_once = layer(shape, **kwargs), layer(shape, **kwargs)

    def tokens(count: int) -> tuple[torch.Tensor, ...]:
        q = torch.randn(count, shape.heads, shape.head_dim).to(shape.dtype)
        k, v = torch.randn(2, count, shape.kv_heads, shape.head_dim).to(shape.dtype)
        return q, k, v

    # Steps: drafts of each request and how many of them are accepted. The first tail demotes.
    steps = [((4, 0, 3), (2, 0, 3)), ((0, 2, 5), (0, 2, 0)), ((1, 1, 1), (1, 0, 1))]
    before = (0, 0, 0)
    for number, (drafts, accepted) in enumerate(steps):
        demotes = [int(number == 0), 0, 0]
        new = [tokens(1 + count) for count in drafts]
        outputs = run(at_once, drafted, new, [1 + count for count in drafts], demotes, before)
        for at in range(1 + max(drafts)):
            # Requests without a further accepted token repeat their last state in a copy.
            pages, blocks = single.pages.clone(), [list(one) for one in single.blocks]
            part = [[x[min(at, len(x) - 1)][None] for x in one] for one in new]
            result = run(one_by_one, single, part, [1, 1, 1], demotes if at == 0 else [0, 0, 0])
            for index in range(3):
                if at <= accepted[index]:
                    assert_close(outputs[index][at], result[index][0], shape)
                    continue
                single.blocks[index] = blocks[index]
                for table in single.tables[index]:
                    single.pages[table] = pages[table]
        for index in range(3):
            drafted.reject(index, drafts[index] - accepted[index])
            assert drafted.blocks[index] == single.blocks[index]
        before = accepted
    # The scores of the last accepted drafts join in the next step.
    last = [tokens(1) for _ in range(3)]
    for ops, requests, accepted in ((at_once, drafted, before), (one_by_one, single, (0, 0, 0))):
        run(ops, requests, last, [1, 1, 1], [1, 0, 0], accepted)
    for index in range(3):
        for sizes, table, other in zip(
            drafted.blocks[index], drafted.tables[index], single.tables[index], strict=True
        ):
            for head in range(shape.kv_heads):
                arguments = (head, shape, LOW, sizes)
                ours = live_bytes(drafted.pages, table, *arguments)
                theirs = live_bytes(single.pages, other, *arguments)
                assert torch.equal(ours, theirs)
                ours = read_tiers(drafted.pages, table, *arguments).scores
                theirs = read_tiers(single.pages, other, *arguments).scores
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, shape: Shape) -> None:
    """Equal but for the order of sums: threads split a request by its number of tokens."""
    tolerance = 2.0**-7 if shape.dtype == torch.bfloat16 else 2.0**-9
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance)


def test_a_batch_reads_the_tables_that_it_was_given():
    """Tables of rows may be a part of a wider array."""
    shape = Shape(block_size=32)
    torch.manual_seed(1)
    requests = Requests(shape)
    rows = requests.rows([1, 1, 1], [0, 0, 0])
    q = torch.randn(3, shape.heads, shape.head_dim).to(shape.dtype)
    k, v = torch.randn(2, 3, shape.kv_heads, shape.head_dim).to(shape.dtype)
    batch = cpu.DecodeBatch.build(rows)
    wide = torch.zeros(len(rows), 2 * batch.tables.shape[1], dtype=torch.int32).numpy()
    wide[:, : batch.tables.shape[1]] = batch.tables
    part = cpu.DecodeBatch.of(batch.rows, wide[:, : batch.tables.shape[1]])
    outputs = []
    for one in (batch, part):
        out = torch.zeros_like(q)
        layer(shape).decode(requests.pages.clone(), one, q, k, v, out)
        outputs.append(out)
    assert torch.equal(*outputs)
