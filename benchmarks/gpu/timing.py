"""Device time of kernels, free of launch gaps and of the cache."""

import statistics
from collections.abc import Callable, Sequence

import torch


def device_time(runs: Sequence[Callable[[], object]], rounds: int = 7, graph: bool = True) -> float:
    """Median seconds of one run.

    Args:
        runs: the same work on different memory, so that none finds its data in the cache.
        rounds: times that all of them are run.
        graph: capture them in a graph, which is replayed: no gaps between launches.
    """

    def once() -> None:
        for run in runs:
            run()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        once()
    torch.cuda.current_stream().wait_stream(stream)
    again: Callable[[], object] = once
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            once()
        again = captured.replay
    again()
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        again()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / len(runs))
    return statistics.median(times)


def copy_bandwidth(num_bytes: int = 2 << 30) -> float:
    """Bytes a second of a device copy, read plus written."""
    source = torch.randint(0, 255, (num_bytes // 4,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 2 * num_bytes / device_time([lambda: target.copy_(source)])
