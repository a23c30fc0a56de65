"""The GPU benchmark's cases hold together, in the interpreter and at a toy's size."""

import pytest
import torch

from benchmarks.gpu import cases
from mikv_vllm.tiers.formats import TierGeometry
from mikv_vllm.tiers.plan import TierPlanner


@pytest.mark.skipif(torch.cuda.is_available(), reason="the benchmark itself runs here")
def test_the_benchmark_covers_every_contender(device, monkeypatch):
    def run_once(runs, rounds=1, graph=True):
        for run in runs[:1]:
            run()
        return 1e-3

    monkeypatch.setattr(cases, "device_time", run_once)
    monkeypatch.setattr(cases, "DEVICE", device)
    monkeypatch.setattr(cases, "CACHE_BYTES", 1)
    monkeypatch.setattr(cases.Heads, "programs", 8)
    heads = cases.Heads("toy", 64, 1, 2)
    rows = list(cases.decode_rows(heads, 704, [2, 999], [1, 4], 1e9, 10**6))
    geometry = TierGeometry(64, cases.BLOCK_SIZE)
    planner = TierPlanner.choose(geometry, 4, cases.RECENT, 704)
    assert [(row["batch"], row["contender"]) for row in rows] == [
        (2, name) for name in ("torch flash", "ours 16-bit", f"ours {planner.low_format.name}")
    ]
    native = heads.native_bytes(704)
    for row in rows:
        tokens = native * row["batch"] / 1e6 / row["MB"]
        assert tokens == pytest.approx(row["ratio"], rel=0.2)
    operations = [row["operation"] for row in cases.prompt_rows(heads, 704, 4.0)]
    assert operations == ["score", "compress", "demote, batch 8"]
