"""Soak test: mixed requests to a server whose page pool is too small for all of them.

The requests have valid and invalid ratios, short and long prompts, streams, several choices, stop
strings, and clients that disconnect. Valid requests must not fail, none may hang, and at the end
all pages must be free and the memory of the server must not have grown.
"""

import argparse
import asyncio
import json
import os
import re
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.traffic import Request, faults_of_answer, faults_of_refusal, random_requests

SMALL_POOL_FLAGS = [
    *("--max-model-len", "1792"),
    *("--max-num-seqs", "24"),
    *("--kv-cache-memory-bytes", str(44 << 20)),  # about 1,900 native tokens
    *("--kv-compression-ratio", "3.0"),
]
"""Flags of a server in which 24 requests compete for a pool that holds one or two."""
SMALL_CACHE = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
"""Environment of a server whose memory is checked. oneDNN caches 1,024 compiled matrix products,
one for each number of tokens in a step. Until this cache is full, the worker grows by hundreds of
MiB, also at ratio 1.0. A cache of 64 is full after the warm-up."""
DEFAULT_RATIO = 3.0
LARGEST_RATIO = 6.0
WARM_UP = 0.3
"""Share of the requests after which the memory of the server must not grow any more."""
SAMPLE_SECONDS = 2.0
SETTLE_SECONDS = 15.0
MIB = 1 << 20


@dataclass
class Outcome:
    """Result of a run."""

    finished: int = 0
    refused: int = 0
    disconnected: int = 0
    violations: list[str] = field(default_factory=list)
    memory: list[tuple[int, int]] = field(default_factory=list)
    """Samples over time: finished requests, and resident bytes of all processes of the server."""
    operations: dict[str, int] = field(default_factory=dict)
    preemptions: int = 0
    seconds: float = 0.0

    @property
    def done(self) -> int:
        return self.finished + self.refused + self.disconnected

    def memory_growth(self) -> int | None:
        """Return the growth in bytes from the end of the warm-up to the end of the run.

        The first and the last quarter of the samples are compared by their medians. The result is
        None if there are too few samples.
        """
        warm = [size for done, size in self.memory if done >= WARM_UP * self.done]
        if len(warm) < 4:
            return None
        quarter = len(warm) // 4
        return int(statistics.median(warm[-quarter:]) - statistics.median(warm[:quarter]))

    def summary(self) -> str:
        """Return the result on one line."""
        growth = self.memory_growth()
        memory = "memory not checked" if growth is None else f"memory {growth / MIB:+.0f} MiB"
        operations = ", ".join(f"{total} {kind}" for kind, total in self.operations.items())
        return (
            f"soak: {self.done} requests in {self.seconds:.0f} s: {self.finished} finished, "
            f"{self.refused} refused, {self.disconnected} disconnected; {operations}, "
            f"{self.preemptions} preemptions; {memory}; {len(self.violations)} violations"
        )


class Soak:
    """A run against one server.

    Args:
        url: URL of the server.
        pid: main process of the server, to check its memory; None disables this check.
        api_key: API key of the server, or None.
        timeout: seconds after which a request is considered to hang.
        default_ratio: ratio of requests that do not have one.
    """

    def __init__(
        self,
        url: str,
        pid: int | None = None,
        api_key: str | None = None,
        timeout: float = 180.0,
        default_ratio: float = DEFAULT_RATIO,
    ) -> None:
        self.url = url
        self.pid = pid
        self.timeout = timeout
        self.default_ratio = default_ratio
        self.outcome = Outcome()
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def run(self, seed: int, count: int, concurrency: int, seconds: float) -> Outcome:
        """Send requests and check the answers.

        Args:
            seed: seed of the random requests.
            count: number of requests.
            concurrency: requests at the same time.
            seconds: no request is sent after this time.
        """
        start = time.monotonic()
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            self.url, headers=self._headers, connector=connector
        ) as self.session:
            served = (await self._get_json("/v1/models"))["data"][0]["id"]
            await self._first_step(served)
            preempted = await self._metric("vllm:num_preemptions_total")
            before = (await self._get_json("/mikv/stats"))["operations"]
            queue = iter(random_requests(seed, count, served, LARGEST_RATIO))
            watch = asyncio.create_task(self._watch(count, start))

            async def client() -> None:
                for request in queue:
                    if time.monotonic() - start > seconds:
                        return
                    await self._send(request)

            await asyncio.gather(*(client() for _ in range(concurrency)))
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            if not watch.cancelled():
                watch.result()
            if self.outcome.done < count:
                self.violate(f"only {self.outcome.done} of {count} requests finished in time")
            after = await self._settle()
            self.outcome.operations = {
                kind: total - before[kind] for kind, total in after["operations"].items()
            }
            preempted = await self._metric("vllm:num_preemptions_total") - preempted
            self.outcome.preemptions = int(preempted)
        self.outcome.seconds = time.monotonic() - start
        return self.outcome

    def violate(self, sentence: str) -> None:
        """Record a violation and print it."""
        self.outcome.violations.append(sentence)
        print(f"violation: {sentence}", flush=True)

    async def _first_step(self, model: str) -> None:
        """Make the engine run a step, because it has no statistics before the first one."""
        body = {"model": model, "prompt": "a", "max_tokens": 1}
        async with self.session.post("/v1/completions", json=body) as response:
            response.raise_for_status()

    async def _send(self, request: Request) -> None:
        """Send a request, then check the answer or disconnect."""
        limit = self.timeout if request.disconnect_after is None else request.disconnect_after
        try:
            async with asyncio.timeout(limit):
                status, answer = await self._answer(request)
        except TimeoutError:
            self.outcome.disconnected += 1
            if request.disconnect_after is None:
                self.violate(f"no complete answer within {limit:.0f} s to {_brief(request)}")
            return
        except (aiohttp.ClientError, ValueError) as error:
            self.outcome.finished += 1
            self.violate(f"{type(error).__name__}: {error}, from {_brief(request)}")
            return
        if request.wrong:
            self.outcome.refused += 1
            faults = faults_of_refusal(request, status, answer)
        elif status != 200:
            self.outcome.finished += 1
            faults = [f"{status} {answer} to {_brief(request)}"]
        else:
            self.outcome.finished += 1
            faults = faults_of_answer(request, answer, self.default_ratio)
        for fault in faults:
            self.violate(fault)

    async def _answer(self, request: Request) -> tuple[int, Any]:
        """Return the status and the JSON body, or the last event of a stream."""
        async with self.session.post(
            request.route, json=request.body, timeout=aiohttp.ClientTimeout(total=None)
        ) as response:
            if response.status != 200 or not request.stream:
                return response.status, await response.json()
            last = b"{}"
            async for line in response.content:
                if line.startswith(b"data: {"):
                    last = line.removeprefix(b"data: ")
            return response.status, json.loads(last)

    async def _watch(self, count: int, start: float) -> None:
        """Sample the pool and the memory, and print the progress, until cancelled."""
        shown = 0
        while True:
            stats = await self._get_json("/mikv/stats")
            pages = dict(stats["pages"])
            if pages.pop("total") != sum(pages.values()):
                self.violate(f"pages do not add up: {stats['pages']}")
            if self.pid is not None:
                self.outcome.memory.append((self.outcome.done, resident_bytes(self.pid)))
            if self.outcome.done >= shown + count // 20:
                shown = self.outcome.done
                resident = self.outcome.memory[-1][1] if self.outcome.memory else 0
                print(
                    f"{shown}/{count} requests, {time.monotonic() - start:.0f} s; "
                    f"pages {stats['pages']}, requests {stats['requests']}, "
                    f"memory {resident / MIB:.0f} MiB",
                    flush=True,
                )
            await asyncio.sleep(SAMPLE_SECONDS)

    async def _settle(self) -> dict[str, Any]:
        """Wait until the server is idle and return its statistics; a timeout is a violation."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            stats = await self._get_json("/mikv/stats")
            queued = [
                await self._metric(f"vllm:num_requests_{state}") for state in ("running", "waiting")
            ]
            free = stats["pages"]["free"] == stats["pages"]["total"]
            if free and not any(stats["requests"].values()) and not any(queued):
                return stats
            if time.monotonic() > deadline:
                self.violate(
                    f"the server is not idle at the end: {stats}, running and waiting {queued}"
                )
                return stats
            await asyncio.sleep(0.5)

    async def _get_json(self, path: str) -> dict[str, Any]:
        async with self.session.get(path) as response:
            response.raise_for_status()
            return await response.json()

    async def _metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        async with self.session.get("/metrics") as response:
            text = await response.text()
        return sum(float(v) for v in re.findall(rf"^{name}{{.*}} (\S+)$", text, re.MULTILINE))


def resident_bytes(pid: int) -> int:
    """Return the resident bytes of a process and all its descendants."""
    process = psutil.Process(pid)
    total = 0
    for each in (process, *process.children(recursive=True)):
        try:
            total += each.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def _brief(request: Request) -> str:
    """Describe a request without its prompt."""
    texts = ("prompt", "messages", "input")
    return f"{request.route} { ({k: v for k, v in request.body.items() if k not in texts}) }"


def check_memory(outcome: Outcome, most_growth: int) -> None:
    """Record a violation if the memory grew by more than ``most_growth`` bytes."""
    growth = outcome.memory_growth()
    if growth is not None and growth > most_growth:
        outcome.violations.append(f"memory grew by {growth / MIB:.0f} MiB")
        print(f"violation: {outcome.violations[-1]}", flush=True)


def check_pressure(outcome: Outcome) -> None:
    """Record a violation if the pool was so large that requests did not compete for pages."""
    if not outcome.preemptions or not outcome.operations.get("compress_in_place"):
        outcome.violations.append("no preemption or no compression in place: the pool is too large")
        print(f"violation: {outcome.violations[-1]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument(
        "--requests", type=int, default=2000, help="number of requests (default: %(default)s)"
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        default=24,
        help="requests at the same time (default: %(default)s)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=40.0,
        help="time after which no request is sent (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=180.0,
        help="longest time of a request, in seconds (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the random requests (default: %(default)s)"
    )
    parser.add_argument(
        "--memory-growth",
        type=int,
        default=64,
        help="growth of memory that is allowed after the warm-up, in MiB (default: %(default)s)",
    )
    parser.add_argument(
        "--url", help="URL of a running mikv-serve (default: start one with a small pool)"
    )
    parser.add_argument(
        "--pid",
        type=int,
        help="main process of the server at --url, to check its memory; start that server with "
        f"{' '.join(f'{k}={v}' for k, v in SMALL_CACHE.items())}",
    )
    parser.add_argument("--api-key", help="API key of the server at --url")
    parser.add_argument(
        "--default-ratio",
        type=float,
        default=DEFAULT_RATIO,
        help="default ratio of the server at --url (default: %(default)s)",
    )
    parser.add_argument(
        "--server-flags",
        type=shlex.split,
        default=[],
        metavar="FLAGS",
        help="more flags of the server that is started, in one argument",
    )
    args = parser.parse_args()

    server = None
    if args.url is None:
        from tests.server.serving import RunningServer

        log = Path(tempfile.mkdtemp(prefix="mikv-soak-")) / "server.log"
        print(f"starting mikv-serve, log in {log} …", flush=True)
        os.environ.update(SMALL_CACHE)
        server = RunningServer([*SMALL_POOL_FLAGS, *args.server_flags], log)
        args.url, args.pid = server.url, server.process.pid
    try:
        if server is not None:
            server.wait_until_ready()
        soak = Soak(args.url, args.pid, args.api_key, args.timeout, args.default_ratio)
        outcome = asyncio.run(
            soak.run(args.seed, args.requests, args.concurrency, 60 * args.minutes)
        )
    finally:
        if server is not None:
            server.stop()
    check_memory(outcome, args.memory_growth * MIB)
    if server is not None:
        check_pressure(outcome)
    print(outcome.summary())
    sys.exit(bool(outcome.violations))


if __name__ == "__main__":
    main()
