"""The cases of the GPU benchmark run, in the interpreter and with small sizes."""

import pytest
import torch

from benchmarks.gpu import cases, xformers_int4
from benchmarks.gpu.__main__ import verdicts
from mikv_vllm.tiers.blocks import BlockPlanner
from mikv_vllm.tiers.formats import TierGeometry


def dequantized(rows):
    """Dequantize rows of :func:`~xformers_int4.pack_rows`, float32."""
    head = rows[..., :1].contiguous().view(torch.float16).float()
    numbers = rows[..., 1:, None] >> 4 * torch.arange(8) & 15
    return numbers.flatten(-2) * head[..., :1] + head[..., 1:]


def attention(q, keys, values):
    """Attention as in :func:`~xformers_int4.decode`."""
    keys, values = dequantized(keys), dequantized(values)
    logits = torch.einsum("bhgd,bthd->bhgt", q.float(), keys) * q.shape[-1] ** -0.5
    return torch.einsum("bhgt,bthd->bhgd", logits.softmax(-1), values)


def test_int4_rows_are_half_a_step_off():
    x = 3 * torch.randn(5, 2, 64) + 1
    rows = xformers_int4.pack_rows(x)
    assert rows.shape == (5, 2, 9)
    step = (x.amax(-1) - x.amin(-1)) / 15
    error = (dequantized(rows) - x).abs().amax(-1)
    assert (error <= 0.52 * step).all()
    assert (error >= 0.3 * step).all()


def test_xformers_reads_the_rows(device):
    if obstacle := xformers_int4.obstacle(device):
        pytest.skip(obstacle)
    q = torch.randn(2, 2, 3, 64, dtype=torch.float16, device=device)
    rows = [xformers_int4.pack_rows(torch.randn(2, 150, 2, 64)) for _ in range(2)]
    out = xformers_int4.decode(q, *(part.to(device) for part in rows)).cpu().float()
    expected = attention(q.cpu(), *rows)
    assert (out - expected).norm() <= 2e-3 * expected.norm()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the benchmark itself runs here")
@pytest.mark.slow
def test_the_benchmark_covers_every_contender(device, monkeypatch):
    def run_once(runs, rounds=1, graph=True):
        for run in runs[:1]:
            run()
        return 1e-3

    monkeypatch.setattr(cases, "device_time", run_once)
    monkeypatch.setattr(xformers_int4, "decode", attention)
    monkeypatch.setattr(cases, "DEVICE", device)
    monkeypatch.setattr(cases, "CACHE_BYTES", 1)
    heads = cases.Heads("toy", 64, 1, 2)
    rows = list(cases.decode_rows(heads, 704, [2, 999], [1, 4], 1e9, 10**6, True))
    geometry = TierGeometry(64, cases.BLOCK_SIZE)
    form = BlockPlanner(geometry, 4, cases.RECENT).tail_form(0)
    assert [(row["batch"], row["contender"]) for row in rows] == [
        *((2, name) for name in ("torch flash", "xformers int4", "ours 16-bit")),
        (2, f"ours {form.low_format.name}"),
    ]
    native = heads.native_bytes(704)
    for row in rows:
        tokens = native * row["batch"] / 1e6 / row["MB"]
        assert tokens == pytest.approx(row["ratio"], rel=0.2)
    operations = [row["operation"] for row in cases.prompt_rows(heads, 704, 4.0)]
    assert operations == ["score", "compress", "score + compress", "demote, batch 8"]
    cases.compile_kernels(heads, 704, 4, [2])


def test_verdicts_compare_with_the_goals():
    decode = [
        {"model": "toy", "batch": 8, "contender": contender, "context": context, "ratio": ratio}
        | {"speed-up": speed, "of copy": "71%"}
        for contender, context, ratio, speed in (
            ("torch flash", 32768, 1.0, 1.0),
            ("ours K6433V3", 4096, 4.0, 2.0),
            ("ours K6433V3", 32768, 4.0, 2.6),
            ("ours K6433V3", 131072, 4.0, 3.0),
        )
    ]
    prompt = {"model": "toy", "operation": cases.TOGETHER, "context": 32768}
    rows = verdicts(decode, [prompt | {"of prefill attention": "4.2%"}])
    measured = [(row["measured"], row["wanted"]) for row in rows]
    assert measured == [(2.6, 2.5), (71.0, 60), (1.5, 1), (4.2, 5)]
