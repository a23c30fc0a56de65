"""What the host does for a decode step: scheduler, serialization, tables and metadata.

No model runs. A scheduler, ours or stock vLLM's, gets many requests, up to 63 tokens shorter than
the context, and made-up tokens; the worker's part is the metadata builder of one group of layers,
on the same step.
"""

import argparse
import json
import pickle
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.sampling_params import SamplingParams
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from mikv_vllm.config import RATIO_FIELD, CompressionConfig
from mikv_vllm.engine.cpu_backend import TieredCPUAttentionMetadataBuilder
from mikv_vllm.engine.scheduler import TieredScheduler
from mikv_vllm.engine.spec import tiered_spec
from mikv_vllm.engine.tier_tables import TierTables
from mikv_vllm.engine.worker_context import context

HEADS, KV_HEADS, HEAD_DIM, LAYERS, BLOCK_SIZE = 32, 8, 128, 4, 32
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HEADS * HEAD_DIM,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": 1000,
    "max_position_embeddings": 1 << 17,
    "torch_dtype": "bfloat16",
}
PARTS = ("schedule", "serialize", "tables and metadata", "update")


class Host:
    """One engine's host side with ``rows`` requests of ``tokens`` tokens.

    Args:
        ratio: 1.0 for stock vLLM.
    """

    def __init__(self, folder: Path, rows: int, tokens: int, ratio: float) -> None:
        self.settings = CompressionConfig(ratio=ratio)
        self.tiered = ratio > 1.0
        self.config = EngineArgs(
            model=str(folder),
            skip_tokenizer_init=True,
            enforce_eager=True,
            enable_prefix_caching=False,
            max_num_seqs=rows,
            max_num_batched_tokens=max(8192, rows * tokens),
            max_model_len=tokens + 1000,
            block_size=BLOCK_SIZE,
            kv_cache_memory_bytes=1 << 20,
            additional_config=self.settings.to_additional_config() if self.tiered else {},
        ).create_engine_config()
        register_all_kvcache_specs(self.config)
        spec = FullAttentionSpec(
            block_size=BLOCK_SIZE,
            num_kv_heads=KV_HEADS,
            head_size=HEAD_DIM,
            dtype=torch.bfloat16,
        )
        if self.tiered:
            spec = tiered_spec(spec, self.settings)
        names = [f"layer.{i}" for i in range(LAYERS)]
        self.scheduler = self._scheduler(spec, names, rows * (tokens // BLOCK_SIZE + 40))
        self.builder = self._builder(spec, names)
        context.tiers = TierTables()
        self.times: dict[str, list[float]] = defaultdict(list)
        for i in range(rows):
            extra = {RATIO_FIELD: ratio} if self.tiered else None
            params = SamplingParams(max_tokens=900, ignore_eos=True, extra_args=extra)
            self.scheduler.add_request(
                Request(f"r{i}", [i % 999] * (tokens - i % 64), params, None)
            )
        while any(request.is_prefill_chunk for request in self.scheduler.running) or (
            not self.scheduler.running
        ):
            self.step(measured=False)
        self.step(measured=False)

    def _scheduler(self, spec: FullAttentionSpec, names: list[str], pages: int) -> Scheduler:
        self.config.cache_config.num_gpu_blocks = pages
        stock = AsyncScheduler if self.config.scheduler_config.async_scheduling else Scheduler
        return (TieredScheduler if self.tiered else stock)(
            vllm_config=self.config,
            kv_cache_config=KVCacheConfig(pages, [], [KVCacheGroupSpec(names, spec)]),
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=BLOCK_SIZE,
            log_stats=True,
        )

    def _builder(self, spec: FullAttentionSpec, names: list[str]) -> CPUAttentionMetadataBuilder:
        with set_current_vllm_config(self.config):
            for name in names:
                Attention(HEADS, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS, prefix=name)
            kind = TieredCPUAttentionMetadataBuilder if self.tiered else CPUAttentionMetadataBuilder
            return kind(spec, names, self.config, torch.device("cpu"))

    def _batch(self, output: SchedulerOutput) -> CommonAttentionMetadata:
        """What vLLM's model runner lays out for a step; not counted."""
        counts = torch.tensor(list(output.num_scheduled_tokens.values()), dtype=torch.int32)
        starts = torch.zeros(len(counts) + 1, dtype=torch.int32)
        starts[1:] = counts.cumsum(0)
        requests = [self.scheduler.requests[r] for r in output.num_scheduled_tokens]
        lengths = torch.tensor([r.num_computed_tokens for r in requests], dtype=torch.int32)
        pages = -(-int(lengths.max()) // BLOCK_SIZE)
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lengths,
            num_reqs=len(counts),
            num_actual_tokens=int(counts.sum()),
            max_query_len=int(counts.max()),
            max_seq_len=int(lengths.max()),
            block_table_tensor=torch.zeros(len(counts), pages, dtype=torch.int32),
            slot_mapping=torch.zeros(int(counts.sum()), dtype=torch.int64),
        )

    def step(self, measured: bool = True) -> None:
        """One step of the engine, without its model."""
        marks = [time.perf_counter()]
        output = self.scheduler.schedule()
        marks.append(time.perf_counter())
        received = pickle.loads(pickle.dumps(output))
        marks.append(time.perf_counter())
        batch = self._batch(output)
        laid_out = time.perf_counter()
        if self.tiered:
            context.compression = self.settings
            context.request_ids = lambda: list(received.num_scheduled_tokens)
            context.begin_step(received)
        self.builder.build(0, batch)
        if self.tiered:
            context.end_step()
        marks.append(time.perf_counter() - laid_out + marks[-1])
        ids = list(output.num_scheduled_tokens)
        done = [[] if self.scheduler.requests[r].is_prefill_chunk else [1] for r in ids]
        result = ModelRunnerOutput(ids, {r: i for i, r in enumerate(ids)}, done)
        start = time.perf_counter()
        self.scheduler.update_from_output(output, result)
        marks.append(time.perf_counter() - start + marks[-1])
        if measured:
            for part, before, after in zip(PARTS, marks, marks[1:], strict=False):
                self.times[part].append(after - before)


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 4096])
    parser.add_argument("--ratio", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    print("| context | µs a step | " + " | ".join(PARTS) + " | sum |")
    print("| --- " * (len(PARTS) + 3) + "|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(MODEL))
        for tokens in args.contexts:
            stock = Host(folder, args.rows, tokens, 1.0)
            ours = Host(folder, args.rows, tokens, args.ratio)
            for _ in range(args.steps):
                stock.step()
                ours.step()
            sums = {}
            for label, host in (("stock", stock), (f"ratio {args.ratio:g}", ours)):
                each = [1e6 * median(host.times[part]) for part in PARTS]
                sums[label] = sum(each)
                cells = " | ".join(f"{value:.0f}" for value in (*each, sums[label]))
                print(f"| {tokens:,} | {label} | {cells} |")


if __name__ == "__main__":
    main()
