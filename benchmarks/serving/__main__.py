"""Compare servers under load: stock vLLM in bf16 and in fp8, MiKV at ratios 1 and 4.

The servers run one after the other with the same pool bytes. Clients send the same requests to each
over HTTP.
"""

import argparse
import json
import tempfile
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.__main__ import machine
from benchmarks.serving import report
from benchmarks.serving.loads import LOADS, QUICK_POOL, Load, Target
from benchmarks.serving.servers import CONTENDERS, Contender, Counters, reset, serve
from mikv_vllm.models import embedded_model


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--loads", nargs="+", choices=list(LOADS), default=list(LOADS))
    parser.add_argument(
        "--full",
        action="store_true",
        help="larger loads, each in a pool of its own size",
    )
    parser.add_argument(
        "--servers",
        nargs="+",
        choices=[contender.name for contender in CONTENDERS],
        default=[contender.name for contender in CONTENDERS if contender.pool == 1],
        metavar="NAME",
        help=f"{', '.join(contender.name for contender in CONTENDERS)} (default: all but the last)",
    )
    parser.add_argument(
        "--pool-tokens",
        type=int,
        help="size of every server's pool, in uncompressed bf16 tokens (default: "
        f"{QUICK_POOL}, or with --full that of each load)",
    )
    parser.add_argument("--model", help="a local folder (default: the embedded model)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    model = args.model or str(embedded_model())
    contenders = [contender for contender in CONTENDERS if contender.name in args.servers]
    by_pool: dict[int, list[Load]] = {}
    for name in args.loads:
        sizes = LOADS[name]
        size = args.pool_tokens or (sizes.full_pool if args.full else QUICK_POOL)
        by_pool.setdefault(size, []).append(sizes.full if args.full else sizes.quick)
    for size, loads in by_pool.items():
        longest = max(load.longest for load in loads)
        if size < longest:
            parser.error(
                f"--pool-tokens is {size}, but the longest request has {longest} tokens; "
                f"give --pool-tokens {longest} or more"
            )
    result: dict[str, Any] = {"date": date.today().isoformat(), "machine": machine(), "loads": []}
    logs = Path(tempfile.mkdtemp(prefix="serving-benchmark-"))
    print(f"logs of the servers: {logs}")
    for size, loads in by_pool.items():
        result["loads"] += run(model, size, loads, contenders, logs)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"serving-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    report.plot(result, path.with_suffix(".png"))
    print(report.tables(result))
    print(f"written: {path}, {path.with_suffix('.png')}")


def run(
    model: str, pool_tokens: int, loads: list[Load], contenders: list[Contender], logs: Path
) -> list[dict[str, Any]]:
    """Run loads against one server after the other.

    Args:
        pool_tokens: size of the pools, in uncompressed bf16 tokens.
        logs: folder for the output of the servers.

    Returns:
        For each load its title, text, pool and rows.
    """
    entries: list[dict[str, Any]] = [
        {"title": load.title, "text": load.text, "pool tokens": pool_tokens, "rows": []}
        for load in loads
    ]
    flags = [
        *("--model", model, "--enforce-eager", "--block-size", "32"),
        *("--max-model-len", str(max(load.longest for load in loads))),
        "--enable-prompt-tokens-details",
    ]

    def server(contender: Contender) -> tuple[str, tuple[str, ...], int]:
        return contender.module, contender.flags, contender.pool

    for _, group in groupby(contenders, server):
        same = list(group)
        print(f"starting {same[0].name} …", flush=True)
        log = logs / f"{same[0].name.replace(' ', '-')}-{pool_tokens}.txt"
        pool = same[0].pool * pool_tokens * token_bytes(model)
        with serve(same[0], [*flags, "--kv-cache-memory-bytes", str(pool)], log) as url:
            for contender in same:
                for load, entry in zip(loads, entries, strict=True):
                    print(f"{contender.name}: {load.title} …", flush=True)
                    reset(url)
                    with Counters(url) as counters:
                        times = load.run(Target(url, model, contender.extra_body))
                    row = report.row(contender.name, times, counters.counted())
                    print(f"  {row['seconds']} s, {row['found in cache']} found", flush=True)
                    entry["rows"].append(row)
    return entries


def token_bytes(model: str) -> int:
    """Bytes of one uncompressed token in the cache, over all layers."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim


if __name__ == "__main__":
    main()
