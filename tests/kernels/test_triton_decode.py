"""The decode step in Triton, compared with the torch oracle."""

import pytest
import torch

from mikv_vllm.kernels import triton as kernels
from mikv_vllm.kernels.triton.jit import Kernel
from mikv_vllm.tiers.blocks import BlockPlanner, TailStep
from mikv_vllm.tiers.formats import LADDER, LowFormat
from mikv_vllm.tiers.plan import TierSizes

from .tiered_cache import (
    Shape,
    expected_attention,
    filled,
    insert_pages,
    live_bytes,
    new_pages,
    oracle_step,
    read_tiers,
    sizes_of,
)
from .triton_layer import DECAY, RECENT, empty_batch, fill_batch, layer


class Step:
    """A decode step of several rows, and its comparison with the oracle."""

    def __init__(self, shape, low_formats, befores, steps, pages, tables, seed):
        self.shape, self.low_formats, self.befores, self.steps = shape, low_formats, befores, steps
        self.pages, self.tables = pages, tables
        rng = torch.Generator().manual_seed(seed)
        rows = len(befores)
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        fused = torch.randn(rows + 2, width, generator=rng).to(shape.dtype)
        sizes = [shape.heads * shape.head_dim] + [shape.kv_heads * shape.head_dim] * 2
        self.qkv = [part.unflatten(1, (-1, shape.head_dim)) for part in fused.split(sizes, 1)]
        # float32, because the interpreter truncates sums to bf16.
        self.out = torch.full((rows + 2, shape.heads, shape.head_dim), 7.0)
        self.places = torch.randperm(rows + 2, generator=rng).tolist()

    def rows(self):
        return [
            (self.places[i], self.tables[i], self.befores[i], self.steps[i], self.low_formats[i])
            for i in range(len(self.befores))
        ]

    def run(self, ops, batch, device, check=True, **kwargs):
        """Run the kernels on ``pages``, and compare the results with the oracle."""
        before = self.pages.clone()
        pages, out = self.pages.to(device), self.out.to(device)
        ops.decode(pages, batch, *(part.to(device) for part in self.qkv), out)
        self.pages.copy_(pages)
        self.out.copy_(out)
        if check:
            self.check(before, **kwargs)

    def check(self, before, softcap=0.0, sinks=None):
        shape, out, places = self.shape, self.out, self.places
        rows = len(self.befores)
        assert torch.equal(out[places[rows:]], torch.full_like(out[places[rows:]], 7.0))
        used = {
            page
            for table, step in zip(self.tables, self.steps, strict=True)
            for page in table[: step.after.pages]
        }
        others = [page for page in range(len(before)) if page not in used]
        assert torch.equal(self.pages[others], before[others])
        q, k, v = self.qkv
        for i in range(rows):
            table, low_format, after = self.tables[i], self.low_formats[i], self.steps[i].after
            request = (shape, low_format, after)
            oracle = before.clone()
            args = (shape, low_format, self.befores[i], self.steps[i])
            oracle_step(oracle, table, *args, k[places[i]], v[places[i]], RECENT)
            for head in range(shape.kv_heads):
                ours = live_bytes(self.pages, table, head, *request)
                theirs = live_bytes(oracle, table, head, *request)
                # A rotation may differ in its last bit, which changes a few integers by one.
                assert (ours != theirs).float().mean() < 0.002
                tiers = read_tiers(self.pages, table, head, *request)
                old = read_tiers(oracle, table, head, *request)
                members = slice(
                    head * shape.queries_per_kv_head, (head + 1) * shape.queries_per_kv_head
                )
                sink = None if sinks is None else sinks[members]
                expected, weights = expected_attention(
                    q[places[i], members], tiers, shape.head_dim**-0.5, softcap, sink
                )
                mine = out[places[i], members]
                assert ((mine - expected).norm() / expected.norm()).item() <= 1e-3
                # Rounding to bf16 alone has an error of 1.6e-3, or more if there are few numbers.
                rounded = mine.to(shape.dtype).double()
                assert ((rounded - expected).norm() / expected.norm()).item() <= 2.2e-3
                torch.testing.assert_close(
                    tiers.scores.double(),
                    DECAY * old.scores.double() + weights[: after.high_tokens],
                    rtol=3e-3,
                    atol=5e-4,
                )


def several_rows(shape, low_format, seed):
    """Four rows of two low formats: one has no low records, one demotes."""
    other = LowFormat((6, 4, 3, 3), 3)
    wanted = [(30, 7, low_format), (17, 1, other), (47, 0, other), (90, 3, low_format)]
    befores, steps, formats, tables = [], [], [], []
    pages = new_pages(shape, 60)
    free = torch.randperm(len(pages)).tolist()
    for i, (high, records, fmt) in enumerate(wanted):
        before = sizes_of(shape, fmt, high, records, slack_lines=i)
        demoted = int(i == 3)
        after = TierSizes(
            before.pages, high + 1 - 32 * demoted, records + demoted, before.low_end_bytes
        )
        befores.append(before)
        steps.append(TailStep(1, (), False, demoted, after))
        formats.append(fmt)
        tables.append([free.pop() for _ in range(before.pages)])
        filled(shape, fmt, before, pages, tables[-1], seed=i, recent=RECENT)
    return Step(shape, formats, befores, steps, pages, tables, seed)


@pytest.mark.parametrize(
    ("shape", "low_format", "kwargs"),
    [
        (Shape(), LowFormat((5, 3, 2, 2), 3), {}),
        (
            Shape(64, queries_per_kv_head=1, block_size=16),
            LowFormat((6, 5, 5, 4), 4),
            {"softcap": 5.0},
        ),
        (
            Shape(80, queries_per_kv_head=4, block_size=32, dtype=torch.float16),
            LowFormat((5, 5, 4, 2), 5),
            {"sinks": True},
        ),
        (
            Shape(96, queries_per_kv_head=8, kv_heads=1, block_size=32),
            LowFormat((6, 4, 3, 3), 4),
            {},
        ),
        (Shape(128, queries_per_kv_head=4, kv_heads=1), LowFormat((6, 4, 3, 3), 4), {}),
        (
            Shape(128, queries_per_kv_head=16, kv_heads=1, block_size=128),
            LowFormat((5, 3, 2, 2), 2),
            {"sinks": True},
        ),
        (Shape(64, high_bits=16, block_size=16), LowFormat((2, 2, 2, 2), 3), {}),
        (
            Shape(80, high_bits=16, dtype=torch.float16),
            LowFormat((6, 6, 3, 2), 2),
            {"softcap": 3.0},
        ),
        (Shape(256, kv_heads=1, block_size=16), LowFormat((4, 2, 2, 2), 2), {}),
        (Shape(), LowFormat((3, 2, 1, 1), 2), {}),
        (Shape(96, block_size=32), LowFormat((3, 2, 2, 1), 2), {}),
        (Shape(), LowFormat.parse("B3V3"), {}),
        (
            Shape(80, queries_per_kv_head=4, block_size=32, dtype=torch.float16),
            LowFormat.parse("B5V5"),
            {"sinks": True},
        ),
        (
            Shape(96, queries_per_kv_head=8, kv_heads=1, block_size=32),
            LowFormat.parse("B4V4"),
            {"softcap": 5.0},
        ),
        (Shape(128, kv_heads=1, high_bits=16), LowFormat.parse("B2V2"), {}),
    ],
)
def test_a_step_of_several_rows(shape, low_format, kwargs, device):
    kwargs = dict(kwargs)
    if kwargs.get("sinks"):
        kwargs["sinks"] = 2 * torch.randn(shape.heads)
    step = several_rows(shape, low_format, seed=5)
    on_device = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in kwargs.items()
    }
    batch = kernels.DecodeBatch.build(step.rows(), device)
    step.run(layer(shape, device, **on_device), batch, device, **kwargs)


def test_a_long_row_is_split(device):
    shape, low_format = Shape(64, kv_heads=1), LowFormat((5, 3, 2, 2), 3)
    before = sizes_of(shape, low_format, 200, 40)
    pages = new_pages(shape, before.pages)
    table = torch.randperm(len(pages)).tolist()
    filled(shape, low_format, before, pages, table, seed=3)
    after = TierSizes(before.pages, 201, 40, before.low_end_bytes)
    step = TailStep(1, (), False, 0, after)
    step = Step(shape, [low_format], [before], [step], pages, [table], 1)
    step.run(layer(shape, device), kernels.DecodeBatch.build(step.rows(), device), device)


def test_many_steps_as_the_planner_plans_them(device):
    shape = Shape(64, kv_heads=1, queries_per_kv_head=2, block_size=16)
    planner = BlockPlanner(shape.geometry, 4.0, RECENT)
    sizes, low_format = planner.tail(0, 480), planner.tail_form(0).low_format
    pages = new_pages(shape, 50)
    free = torch.randperm(len(pages)).tolist()
    table = [free.pop() for _ in range(sizes.pages)]
    filled(shape, low_format, sizes, pages, table, seed=1)
    ops = layer(shape, device, programs=4)
    seen = set()
    for i in range(24):
        plan = planner.append(0, sizes)
        insert_pages(pages, table, free, plan)
        sizes = planner.lengthen(sizes, plan.after.pages)
        step = Step(shape, [low_format], [sizes], [plan], pages, [table], seed=i)
        check = bool(plan.demoted_records or i % 8 == 0)
        step.run(ops, kernels.DecodeBatch.build(step.rows(), device), device, check=check)
        seen |= {plan.demoted_records > 0}
        sizes = plan.after
    assert True in seen


def test_a_batch_with_rows_that_have_no_request(device):
    shape, low_format = Shape(), LowFormat((5, 3, 2, 2), 3)
    step = several_rows(shape, low_format, seed=2)
    formats = [low_format, LowFormat((6, 4, 3, 3), 3), LowFormat((4, 2, 2, 2), 2)]
    batch = empty_batch(6, 20, formats, 120, device)
    ops = layer(shape, device)
    q = torch.zeros(8, shape.heads, shape.head_dim, dtype=shape.dtype, device=device)
    k = torch.zeros(8, shape.kv_heads, shape.head_dim, dtype=shape.dtype, device=device)
    out = torch.full_like(q, 7.0)
    pages = step.pages.to(device)
    ops.decode(pages, batch, q, k, k, out)
    assert torch.equal(out, torch.full_like(out, 7.0))
    assert torch.equal(pages.cpu(), step.pages)
    fill_batch(batch, step.rows())
    step.run(ops, batch, device)


@pytest.mark.parametrize(
    ("names", "launches"),
    [
        (["K6544V4", "K6544V4", "K6544V4"], 1),
        (["K6544V4", "K6655V5", "K6544V5"], 1),
        (["K6655V5", "K4221V2", "K5332V3"], 3),
    ],
)
def test_neighbours_of_the_ladder_share_a_launch(device, monkeypatch, names, launches):
    launched = []
    launch = Kernel.__getitem__

    def count(kernel, grid):
        launched.append(kernel.jit.fn.__name__)
        return launch(kernel, grid)

    monkeypatch.setattr(Kernel, "__getitem__", count)
    shape = Shape(64, kv_heads=1)
    low_formats = [LowFormat.parse(name) for name in names]
    befores = [sizes_of(shape, one, 40 + i, 2 + i) for i, one in enumerate(low_formats)]
    pages = new_pages(shape, sum(before.pages for before in befores))
    free = torch.randperm(len(pages)).tolist()
    tables = [[free.pop() for _ in range(before.pages)] for before in befores]
    steps = []
    for i, before in enumerate(befores):
        filled(shape, low_formats[i], before, pages, tables[i], seed=i)
        high, low, end = before.high_tokens, before.low_records, before.low_end_bytes
        after = TierSizes(before.pages, high + 1, low, end)
        steps.append(TailStep(1, (), False, 0, after))
    step = Step(shape, low_formats, befores, steps, pages, tables, seed=9)
    batch = kernels.DecodeBatch.build(step.rows(), device, LADDER)
    step.run(layer(shape, device), batch, device)
    assert launched == ["append_kernel", *launches * ["attend_kernel"], "merge_kernel"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"head_dim": 192}, "head_dim is 192, but must be one of"),
        ({"block_size": 24}, "block_size is 24, but must be a multiple of 16"),
        ({"num_heads": 5}, "num_heads is 5, but must be a multiple of num_kv_heads, 2"),
    ],
)
def test_unsupported_parameters_are_refused(changed, message):
    shape = {"head_dim": 64, "num_heads": 6, "num_kv_heads": 2, "block_size": 64, "high_bits": 8}
    with pytest.raises(ValueError, match=message):
        kernels.LayerOps(
            **shape | changed,
            scale=0.125,
            softcap=0.0,
            sinks=None,
            decay=DECAY,
            recent=RECENT,
            scratch=kernels.Scratch("cpu"),
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
def test_a_captured_step_follows_the_tiers_sizes():
    shape = Shape(64, kv_heads=2, queries_per_kv_head=2, block_size=32)
    planner = BlockPlanner(shape.geometry, 4.0, RECENT)
    sizes, low_format = planner.tail(0, 300), planner.tail_form(0).low_format
    pages = new_pages(shape, 40, poison=None)
    free = torch.randperm(len(pages)).tolist()
    table = [free.pop() for _ in range(sizes.pages)]
    filled(shape, low_format, sizes, pages, table, seed=1)
    on_gpu, ops = pages.cuda(), layer(shape, "cuda")
    batch = empty_batch(4, len(pages), [low_format], 160, "cuda")
    q = torch.zeros(3, shape.heads, shape.head_dim, dtype=shape.dtype, device="cuda")
    k, v = (torch.zeros_like(q[:, : shape.kv_heads]) for _ in range(2))
    out = torch.zeros(q.shape, device="cuda")
    ops.decode(on_gpu, batch, q, k, v, out)  # compiles, and allocates scratch
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.decode(on_gpu, batch, q, k, v, out)
    for i in range(100):
        plan = planner.append(0, sizes)
        insert_pages(pages, table, free, plan)
        on_gpu.copy_(pages)
        sizes = planner.lengthen(sizes, plan.after.pages)
        step = Step(shape, [low_format], [sizes], [plan], pages, [table], seed=i)
        fill_batch(batch, step.rows())
        for static, part in zip((q, k, v), step.qkv, strict=True):
            static.copy_(part)
        out.fill_(7.0)
        graph.replay()
        before = pages.clone()
        pages.copy_(on_gpu)
        step.out.copy_(out)
        step.check(before)
        sizes = plan.after
