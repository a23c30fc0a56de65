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

from benchmarks.__main__ import machine
from benchmarks.serving import report
from benchmarks.serving.loads import LOADS, Target
from benchmarks.serving.servers import CONTENDERS, Counters, reset, serve
from mikv_vllm.models import embedded_model


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--loads", nargs="+", choices=list(LOADS), default=list(LOADS))
    parser.add_argument(
        "--pool-tokens",
        type=int,
        default=4000,
        help="size of every server's pool, in uncompressed bf16 tokens (default %(default)s)",
    )
    parser.add_argument("--model", help="a local folder (default: the embedded model)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    model = args.model or str(embedded_model())
    loads = [LOADS[name]() for name in args.loads]
    longest = max(load.longest for load in loads)
    if args.pool_tokens < longest:
        parser.error(
            f"--pool-tokens is {args.pool_tokens}, but the longest request has {longest} tokens; "
            f"give --pool-tokens {longest} or more"
        )
    pool = args.pool_tokens * token_bytes(model)
    flags = [
        *("--model", model, "--enforce-eager", "--max-model-len", str(longest)),
        *("--kv-cache-memory-bytes", str(pool), "--block-size", "32"),
        "--enable-prompt-tokens-details",
    ]
    result = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "pool": f"{pool} bytes, {args.pool_tokens} tokens in bf16",
        "loads": [{"title": load.title, "text": load.text, "rows": []} for load in loads],
    }
    logs = Path(tempfile.mkdtemp(prefix="serving-benchmark-"))
    print(f"logs of the servers: {logs}")
    for _, group in groupby(CONTENDERS, lambda contender: (contender.module, contender.flags)):
        contenders = list(group)
        print(f"starting {contenders[0].name} …", flush=True)
        log = logs / f"{contenders[0].name.replace(' ', '-')}.txt"
        with serve(contenders[0], flags, log) as url:
            for contender in contenders:
                for load, entry in zip(loads, result["loads"], strict=True):
                    print(f"{contender.name}: {load.title} …", flush=True)
                    reset(url)
                    with Counters(url) as counters:
                        times = load.run(Target(url, model, contender.extra_body))
                    row = report.row(contender.name, times, counters.counted())
                    print(f"  {row['seconds']} s, {row['found in cache']} found", flush=True)
                    entry["rows"].append(row)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"serving-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    report.plot(result, path.with_suffix(".png"))
    print(report.tables(result))
    print(f"written: {path}, {path.with_suffix('.png')}")


def token_bytes(model: str) -> int:
    """Bytes of one uncompressed token in the cache, over all layers."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim


if __name__ == "__main__":
    main()
