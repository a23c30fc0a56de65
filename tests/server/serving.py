"""A real ``mikv-serve`` on loopback, for tests."""

from pathlib import Path

import httpx

from mikv_vllm.evaluation.served_tasks.local_server import LocalServer


class RunningServer(LocalServer):
    """A :class:`LocalServer` with a client.

    Args:
        flags: of mikv-serve, beside host and port.
        log: file for its output.
        api_key: sent with every request of :attr:`client`.
        env: environment variables beside those of this process.
        module: started with ``python -m``.
    """

    def __init__(
        self,
        flags: list[str],
        log: Path,
        api_key: str | None = None,
        env: dict[str, str] | None = None,
        module: str = "mikv_vllm.server.cli",
    ) -> None:
        super().__init__(flags, log, {"HF_HUB_OFFLINE": "1"} | (env or {}), module)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.client = httpx.Client(base_url=self.url, headers=headers, timeout=300)

    def stop(self) -> int:
        """Close the client, and ask the server to stop; return its exit status."""
        self.client.close()
        return super().stop()
