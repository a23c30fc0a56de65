"""Device time of kernels, without launch gaps and without hits in the L2 cache."""

import statistics
from collections.abc import Callable, Sequence

import torch


def device_time(runs: Sequence[Callable[[], object]], rounds: int = 7, graph: bool = True) -> float:
    """Return the median time of one run in seconds.

    Args:
        runs: the same work on different memory, so that no run finds its data in the L2 cache.
        rounds: how often all runs are repeated.
        graph: replay the runs from a CUDA graph, so that there are no gaps between launches.
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
    """Bytes per second that a copy on the device reads and writes."""
    source = torch.randint(0, 255, (num_bytes // 4,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 2 * num_bytes / device_time([lambda: target.copy_(source)])
