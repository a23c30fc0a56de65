"""What turns a stock vLLM into MiKV: its engine arguments, in one place."""

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
"""Worker class by vLLM's device type. A device that is missing here has no kernels yet."""

CPU_BLOCK_SIZE = 32
"""Tokens of a native page on CPU, unless the user chooses."""

PLUGIN = "mikv"
"""Name of MiKV's entry point, an endpoint plugin of vLLM."""

_OPT_IN_PLUGINS = frozenset({"lora_hf_hub_resolver"})
"""General plugins of vLLM that do more when they are named, so nothing but the user names them."""


def wire(
    engine_args: Mapping[str, Any],
    config: CompressionConfig,
    device_type: str,
    embedded: bool = False,
) -> dict[str, Any]:
    """The engine arguments to set so that vLLM runs as MiKV.

    Args:
        engine_args: vLLM's engine arguments as the user gave them, by field name.
        config: settings of the two-tier cache; they reach every process in
            ``additional_config``, beside what the user put there.
        device_type: of vLLM's current platform, for example ``cpu``.
        embedded: the model is the embedded one. It is small: its cache is kept small too, and it
            runs eagerly unless the user says otherwise, which saves a minute of compilation.

    Raises:
        Refusal: an argument that MiKV cannot serve, or a device that it does not run on.
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
    additional_config = dict(engine_args.get("additional_config") or {})
    if ADDITIONAL_CONFIG_KEY in additional_config:
        raise Refusal(
            f"--additional-config has the key {ADDITIONAL_CONFIG_KEY!r}, which MiKV sets itself; "
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


def _cpu_defaults(engine_args: Mapping[str, Any], cache_limit: int | None) -> dict[str, Any]:
    """Page and cache size on CPU, where the user chose none."""
    defaults: dict[str, Any] = {}
    if engine_args.get("block_size") is None:
        defaults["block_size"] = CPU_BLOCK_SIZE
    if cache_bytes := cpu_cache_bytes(engine_args, available_bytes(), cache_limit):
        logger.info(
            "KV cache: %.2f GiB for each worker, a default; --kv-cache-memory-bytes sets it.",
            cache_bytes / GIB,
        )
        defaults["kv_cache_memory_bytes"] = cache_bytes
    return defaults


def allow_plugin() -> None:
    """Make vLLM load MiKV's endpoint plugin, here and in child processes, and all others as ever.

    vLLM loads an endpoint plugin only if ``VLLM_PLUGINS`` names it. That variable is also the
    allow-list of every other plugin group, where leaving it unset means all: so all are named.
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
