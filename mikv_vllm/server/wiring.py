"""The engine arguments that make vLLM run as MiKV."""

import logging
import os
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from mikv_vllm.config import ADDITIONAL_CONFIG_KEY, CompressionConfig
from mikv_vllm.server.memory import EMBEDDED_LIMIT, GIB, available_bytes, cpu_cache_bytes
from mikv_vllm.server.refusals import Refusal, check_flags

logger = logging.getLogger("vllm.mikv")

SCHEDULER_CLS = "mikv_vllm.engine.scheduler.TieredScheduler"
WORKER_CLS = {
    "cpu": "mikv_vllm.engine.cpu_worker.TieredCPUWorker",
    "cuda": "mikv_vllm.engine.gpu_worker.TieredGPUWorker",
}
"""Worker class by vLLM's device type. MiKV has no kernels for other devices."""

CPU_BLOCK_SIZE = 32
"""Default tokens of a native page on CPU."""
BLOCK_SIZE_MULTIPLE = {"cpu": 32, "cuda": 16}
"""The attention kernels of a device support native pages whose tokens are a multiple of this."""

PLUGIN = "mikv"
"""Name of MiKV's entry point, an endpoint plugin of vLLM."""

_OPT_IN_PLUGINS = frozenset({"lora_hf_hub_resolver"})
"""General plugins of vLLM that are active only if ``VLLM_PLUGINS`` names them."""


def wire(
    engine_args: Mapping[str, Any],
    config: CompressionConfig,
    device_type: str,
    embedded: bool = False,
) -> dict[str, Any]:
    """Return the engine arguments to set so that vLLM runs as MiKV.

    Args:
        engine_args: vLLM's engine arguments as the user set them, by field name.
        config: settings of the two-tier cache. Every process receives them in
            ``additional_config``, which keeps the user's entries.
        device_type: device type of vLLM's current platform, for example ``cpu``.
        embedded: whether the model is the embedded one. Its default cache is small, and it runs
            eagerly unless the user set ``enforce_eager``, which saves a minute of compilation.

    Raises:
        Refusal: an argument or a device that MiKV does not support.
    """
    check_flags(engine_args)
    if device_type not in WORKER_CLS:
        raise Refusal(
            f"This version of MiKV has no kernels for the device {device_type!r}; "
            f"it runs on: {', '.join(sorted(WORKER_CLS))}."
        )
    for name in ("distributed_executor_backend", "data_parallel_backend"):
        if device_type == "cpu" and engine_args.get(name) == "ray":
            flag = "--" + name.replace("_", "-")
            raise Refusal(f"{flag} ray is not supported by vLLM on CPU; use mp.")
    _check_block_size(engine_args, device_type)
    additional_config = dict(engine_args.get("additional_config") or {})
    if ADDITIONAL_CONFIG_KEY in additional_config:
        raise Refusal(
            f"--additional-config has the key {ADDITIONAL_CONFIG_KEY!r}, which MiKV sets; "
            "use the --kv-… flags of the group MiKV instead."
        )
    wired: dict[str, Any] = {
        "scheduler_cls": SCHEDULER_CLS,
        "worker_cls": WORKER_CLS[device_type],
        "additional_config": additional_config | config.to_additional_config(),
    }
    if embedded and engine_args.get("enforce_eager") is None:
        wired["enforce_eager"] = True
    if device_type == "cpu":
        wired |= _cpu_defaults(engine_args, EMBEDDED_LIMIT if embedded else None)
    return wired


def _check_block_size(engine_args: Mapping[str, Any], device_type: str) -> None:
    size, multiple = engine_args.get("block_size"), BLOCK_SIZE_MULTIPLE[device_type]
    if size is not None and (size < multiple or size % multiple):
        raise Refusal(
            f"--block-size {size} is not supported by the attention kernels for the device "
            f"{device_type!r}; use a multiple of {multiple}."
        )


def _cpu_defaults(engine_args: Mapping[str, Any], cache_limit: int | None) -> dict[str, Any]:
    """Return default page and cache sizes on CPU for those that the user did not set."""
    defaults: dict[str, Any] = {}
    if engine_args.get("block_size") is None:
        defaults["block_size"] = CPU_BLOCK_SIZE
    if cache_bytes := cpu_cache_bytes(engine_args, available_bytes(), cache_limit):
        logger.info(
            "KV cache: %.2f GiB for each worker (default; set it with --kv-cache-memory-bytes).",
            cache_bytes / GIB,
        )
        defaults["kv_cache_memory_bytes"] = cache_bytes
    return defaults


def allow_plugin() -> None:
    """Make vLLM load MiKV's endpoint plugin in this process and in child processes.

    vLLM loads an endpoint plugin only if ``VLLM_PLUGINS`` names it. For the other plugin groups,
    the variable is a list of all plugins to load. If the user did not set it, all of them are
    therefore named.
    """
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None:
        groups = ("general", "io_processor", "platform", "stat_logger")
        found = {p.name for group in groups for p in entry_points(group=f"vllm.{group}_plugins")}
        names = sorted(found - _OPT_IN_PLUGINS)
    else:
        names = [name for name in allowed.split(",") if name]
    if PLUGIN not in names:
        names.append(PLUGIN)
    os.environ["VLLM_PLUGINS"] = ",".join(names)
