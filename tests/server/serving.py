"""A real ``mikv-serve`` on loopback, for tests."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

import httpx

START_SECONDS = 300
STOP_SECONDS = 60


class RunningServer:
    """``mikv-serve`` in a process of its own, always stopped by its own id.

    Args:
        flags: of mikv-serve, beside host and port.
        log: file for its output.
        api_key: sent with every request of :attr:`client`.
        env: environment variables beside those of this process.
        module: started with ``python -m``.

    As a context manager it is ready inside, and stopped after.
    """

    def __init__(
        self,
        flags: list[str],
        log: Path,
        api_key: str | None = None,
        env: dict[str, str] | None = None,
        module: str = "mikv_vllm.server.cli",
    ) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.client = httpx.Client(base_url=self.url, headers=headers, timeout=300)
        command = [sys.executable, "-m", module, "--host", "127.0.0.1"]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port), *flags],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"HF_HUB_OFFLINE": "1"} | (env or {}),
            )

    def __enter__(self) -> Self:
        try:
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def wait_until_ready(self) -> None:
        """Return once it answers; fail with the end of its log if it never does."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.client.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.5)
        tail = "\n".join(self.log.read_text().splitlines()[-40:])
        raise AssertionError(f"mikv-serve did not start:\n{tail}")

    def stop(self) -> int:
        """Ask it to stop as an operator would, and return its exit code."""
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
