"""Checks that the server and the offline class share, once the model's config is known."""

import logging
from typing import TYPE_CHECKING

from mikv_vllm.config import CompressionConfig, parse_ratio
from mikv_vllm.server import refusals
from mikv_vllm.tiers import calibrations
from mikv_vllm.tiers.plan import largest_ratio

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.mikv")


def calibrated(vllm_config: "VllmConfig", config: CompressionConfig) -> CompressionConfig:
    """Return the settings with the low formats of the model, if it was calibrated.

    Logs what each ratio costs. Low formats that the user chose are not replaced.

    Args:
        vllm_config: vLLM's configuration, before an engine starts.
        config: MiKV's settings.
    """
    if config.low_formats is not None or config.codec != "channel":
        return config
    shape = calibrations.ModelShape.of_config(vllm_config.model_config.hf_text_config)
    found = calibrations.find(shape)
    if found is None:
        logger.info(
            "MiKV: no calibration for a model of this shape; its low formats are those of "
            "SmolLM2-135M-Instruct. `mikv-eval calibrate` finds its own, for --kv-low-formats."
        )
        return config
    logger.info(
        "MiKV: low formats of %s. Its mean KL divergence to the uncompressed cache, in nats: %s.",
        found.model,
        found.describe(),
    )
    return config.model_copy(update={"low_formats": found.low_formats})


def check_and_echo(vllm_config: "VllmConfig", config: CompressionConfig, ratio_name: str) -> float:
    """Refuse what MiKV does not support, log the settings, and return the largest ratio.

    Args:
        vllm_config: vLLM's configuration, before an engine starts.
        config: MiKV's settings.
        ratio_name: the user's name of the default ratio, for the message.

    Raises:
        Refusal: the model or the configuration is not supported.
        RatioError: the default ratio is out of range for this model.
    """
    refusals.check(vllm_config)
    head_dim = vllm_config.model_config.get_head_size()
    largest = largest_ratio(head_dim, config.high_bits, config.ladder)
    parse_ratio(config.ratio, largest, ratio_name)
    settings = ", ".join(f"{name} {value}" for name, value in config.model_dump().items())
    logger.info("MiKV: %s; largest ratio %g (head size %d).", settings, largest, head_dim)
    return largest
