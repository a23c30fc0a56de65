"""``mikv_vllm.LLM``: ``vllm.LLM`` with a two-tier KV cache, for offline use."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import vllm
from vllm import RequestOutput, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext

from mikv_vllm.config import RATIO_FIELD, parse_ratio
from mikv_vllm.models import EMBEDDED_NAME, embedded_model
from mikv_vllm.server.capacity import check_capacity
from mikv_vllm.server.metrics import install_metrics
from mikv_vllm.server.options import make_config
from mikv_vllm.server.reports import collect_reports
from mikv_vllm.server.start import calibrated, check_and_echo
from mikv_vllm.server.wiring import wire

Params: TypeAlias = SamplingParams | Sequence[SamplingParams] | None


class LLM(vllm.LLM):
    """A ``vllm.LLM`` that keeps every token of a request at one of two precisions.

    ``SamplingParams(extra_args={"kv_compression_ratio": 4.0})`` sets the ratio of one request.
    ``RequestOutput.kv_transfer_params["kv_compression"]`` contains the report of a finished
    request; with ``n > 1`` it is the sum over the request's sequences.

    Args:
        model: as in ``vllm.LLM``; None selects the embedded SmolLM2-135M-Instruct.
        kv_compression_ratio: default ratio, for requests without a ratio. 1.0 does not compress.
        compression: other settings, by field name of
            :class:`mikv_vllm.config.CompressionConfig`.
        **kwargs: further arguments of ``vllm.LLM``.

    Raises:
        ValueError: MiKV does not support an argument or the model.
        EmbeddedModelError: no model was given, and the embedded model is unavailable.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        kv_compression_ratio: float = 1.0,
        compression: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        config = make_config({"ratio": kv_compression_ratio} | (compression or {}))
        kwargs |= wire(kwargs, config, current_platform.device_type, embedded=model is None)
        if model is None:
            model = str(embedded_model())
            kwargs.setdefault("served_model_name", EMBEDDED_NAME)
        vllm_config = _engine_args(model, kwargs).create_engine_config(UsageContext.LLM_CLASS)
        config = calibrated(vllm_config, config)
        kwargs["additional_config"] |= config.to_additional_config()
        self._largest_ratio = check_and_echo(vllm_config, config, "kv_compression_ratio")
        super().__init__(model, **kwargs)
        check_capacity(self.llm_engine.input_processor, self.llm_engine.vllm_config, config)
        collect_reports(self.llm_engine.output_processor)
        install_metrics(self.llm_engine.logger_manager, self.llm_engine.vllm_config)

    def generate(
        self, prompts: Any, sampling_params: Params = None, **kwargs: Any
    ) -> list[RequestOutput]:
        """Generate as ``vllm.LLM.generate`` does.

        Raises:
            RatioError: a ratio is wrong; no request is queued.
        """
        self._check_ratios(sampling_params)
        return super().generate(prompts, sampling_params, **kwargs)

    def enqueue(
        self, prompts: Any, sampling_params: Params = None, *args: Any, **kwargs: Any
    ) -> list[str]:
        """Queue requests as ``vllm.LLM.enqueue`` does.

        Raises:
            RatioError: a ratio is wrong; no request is queued.
        """
        self._check_ratios(sampling_params)
        return super().enqueue(prompts, sampling_params, *args, **kwargs)

    def chat(
        self, messages: Any, sampling_params: Params = None, *args: Any, **kwargs: Any
    ) -> list[RequestOutput]:
        """Generate as ``vllm.LLM.chat`` does.

        Raises:
            RatioError: a ratio is wrong; no request is queued.
        """
        self._check_ratios(sampling_params)
        return super().chat(messages, sampling_params, *args, **kwargs)

    def _check_ratios(self, sampling_params: Params) -> None:
        every = sampling_params if isinstance(sampling_params, Sequence) else [sampling_params]
        for params in every:
            ratio = (getattr(params, "extra_args", None) or {}).get(RATIO_FIELD)
            if ratio is not None:
                parse_ratio(ratio, self._largest_ratio)


def _engine_args(model: str, kwargs: dict[str, Any]) -> EngineArgs:
    """Return the engine arguments that ``vllm.LLM`` creates from the same keyword arguments.

    They are needed before ``vllm.LLM`` is constructed, because its constructor starts the engine.
    """
    fields = {field.name for field in dataclasses.fields(EngineArgs)}
    given = {name: value for name, value in kwargs.items() if name in fields and value is not None}
    given = copy.deepcopy(given)
    if isinstance(given.get("compilation_config"), int):
        given["compilation_config"] = {"mode": given["compilation_config"]}
    return EngineArgs(model=model, **given)
