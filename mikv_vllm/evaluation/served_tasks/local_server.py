"""``mikv-serve`` in a process of its own, on loopback."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

import httpx

START_SECONDS = 900
STOP_SECONDS = 60
LOG_LINES = 40
"""Lines of the log that an error message shows."""


class LocalServer:
    """A server that is ready inside a ``with`` block, and stopped by its own id after it.

    Args:
        flags: flags of the server, without host and port.
        log: receives its output.
        env: environment variables beside those of this process.
        module: started with ``python -m``.

    Raises:
        ValueError: the server does not start.
    """

    def __init__(
        self,
        flags: list[str],
        log: Path,
        env: dict[str, str] | None = None,
        module: str = "mikv_vllm.server.cli",
    ) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", str(self.port)]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, *flags],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | (env or {}),
            )

    def __enter__(self) -> Self:
        try:
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until_ready(self) -> None:
        """Return once the server answers.

        Raises:
            ValueError: it ends, or never answers; the message has the end of its log.
        """
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.5)
        tail = "\n".join(self.log.read_text().splitlines()[-LOG_LINES:])
        raise ValueError(f"mikv-serve did not start; the end of {self.log}:\n{tail}")

    def stop(self) -> int:
        """Ask the server to stop as an operator would, and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
