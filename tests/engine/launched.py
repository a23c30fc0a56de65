"""A real engine on CPU tensors whose Triton kernels are compiled and launched for an H100.

    python -m tests.engine.launched FOLDER OUT.json

Triton's compiler and launcher are the real ones; the driver behind them does nothing, so the
engine computes on garbage. Writes how often each kernel was compiled: by the GPU worker's warm-up,
and since then, in batches that use every operation.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from .interpreted import BATCHES, generate, prepare, start_engine, warm_up

LOW_FORMAT = "K6433V3"
"""The only one here: each costs half a minute."""


class Driver:
    """A GPU of which Triton can only ask what it is."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.loaded: Counter[str] = Counter()
        self.target = GPUTarget("cuda", 90, 32)
        self.utils = SimpleNamespace(
            load_binary=self._load, get_device_properties=lambda _: {"max_shared_mem": 227 << 10}
        )

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def launcher_cls(self, _source, _metadata):
        return lambda *_: None

    def _load(self, name: str, _binary: bytes, _shared: int, _device: int) -> tuple:
        self.loaded[name] += 1
        return 1, 1, 0, 0, 1024


def main(folder: str, out: Path) -> None:
    prepare("triton", "1", interpret=False)
    import triton

    driver = Driver()
    triton.runtime.driver.set_active(driver)
    engine = start_engine(folder, BATCHES["long"], low_formats=(LOW_FORMAT,))
    driver.loaded.clear()
    engine.collective_rpc(warm_up)
    loaded = dict(driver.loaded)
    driver.loaded.clear()
    for batch in ("long", "in place"):
        generate(engine, BATCHES[batch])
    operations = engine.collective_rpc("mikv_stats")[0]["operations"]
    counts = {"warm_up": loaded, "later": driver.loaded, "operations": operations}
    out.write_text(json.dumps(counts, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
