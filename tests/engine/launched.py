"""A real engine on CPU tensors that compiles and launches the Triton kernels for an H100.

    python -m tests.engine.launched FOLDER OUT.json

Triton's compiler and launcher are used with a driver that does nothing, so the results of the
engine are arbitrary. Writes how often each kernel was compiled: by the warm-up of the GPU worker,
and later by batches that use every operation.
"""

import json
import sys
from pathlib import Path

from .interpreted import BATCHES, generate, prepare, start_engine, warm_up

LOW_FORMAT = "K6433V3"
"""The only low format, because compilation is slow."""


def main(folder: str, out: Path) -> None:
    prepare("triton", "1", interpret=False)
    import triton

    from benchmarks.gpu.launches import Driver

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
