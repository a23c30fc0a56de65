"""Methods of vLLM that the server side replaces at run time, one function for each hook.

The other modules of this package contain the behaviour and pass it to these functions. A method is
replaced on one object of this process, never on a class. Each docstring names the file in
``patches/`` that would make the hook unnecessary, if there is one.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.metrics.loggers import AggregateStatLoggerBase, StatLoggerManager


def prepare_params(engine: "AsyncLLM", prepare: Callable[[Any], None]) -> None:
    """Call ``prepare`` with the parameters of each request before the engine accepts it.

    vLLM has no interface that sets or checks ``SamplingParams.extra_args`` for all routes: some
    routes do not forward ``vllm_xargs``, others accept ``SamplingParams`` directly. Patch: none.

    Args:
        engine: its ``add_request`` is replaced.
        prepare: receives ``SamplingParams`` or ``PoolingParams``, and may change them; raises an
            error to refuse them.
    """
    add_request = engine.add_request

    async def prepare_and_add(
        request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        prepare(params)
        return await add_request(request_id, prompt, params, *args, **kwargs)

    engine.add_request = prepare_and_add


def check_inputs(processor: "InputProcessor", check: Callable[["EngineCoreRequest"], None]) -> None:
    """Call ``check`` with each request after its prompt is tokenized, before it is queued.

    vLLM's scheduler cannot refuse a request: a request that never fits would wait forever. The
    number of prompt tokens is first known here. Patch: none.

    Args:
        processor: its ``process_inputs`` and ``process_inputs_async`` are replaced. vLLM's
            asynchronous method calls the original synchronous one, so neither check runs twice.
        check: may change the request; raises an error to refuse it.
    """
    process_inputs, process_inputs_async = processor.process_inputs, processor.process_inputs_async

    def process_and_check(*args: Any, **kwargs: Any) -> "EngineCoreRequest":
        request = process_inputs(*args, **kwargs)
        check(request)
        return request

    async def process_and_check_async(*args: Any, **kwargs: Any) -> "EngineCoreRequest":
        request = await process_inputs_async(*args, **kwargs)
        check(request)
        return request

    processor.process_inputs = process_and_check
    processor.process_inputs_async = process_and_check_async


def observe_outputs(
    processor: "OutputProcessor",
    on_add: Callable[["EngineCoreRequest"], None],
    on_outputs: Callable[[list["EngineCoreOutput"]], None],
) -> None:
    """Call ``on_add`` after a request is added, and ``on_outputs`` before outputs are processed.

    vLLM's output processor keeps the ``kv_transfer_params`` of one sequence of a request, and a
    stream has none. All sequences of a request pass through it. Patch:
    ``0003-stream-transfer-params``, for streams with one choice.

    Args:
        processor: its ``add_request`` and ``process_outputs`` are replaced.
        on_add: runs in the context (:mod:`contextvars`) of the caller.
        on_outputs: may change the outputs.
    """
    add_request, process_outputs = processor.add_request, processor.process_outputs

    def add_and_notify(request: "EngineCoreRequest", *args: Any, **kwargs: Any) -> None:
        add_request(request, *args, **kwargs)
        on_add(request)

    def notify_and_process(outputs: list["EngineCoreOutput"], *args: Any, **kwargs: Any) -> Any:
        on_outputs(outputs)
        return process_outputs(outputs, *args, **kwargs)

    processor.add_request = add_and_notify
    processor.process_outputs = notify_and_process


def extend_schema(app: "FastAPI", extend: Callable[[dict[str, Any]], None]) -> None:
    """Call ``extend`` with the OpenAPI schema of the server when it is created.

    FastAPI's documentation describes this replacement. vLLM's request models accept unknown fields
    without naming them. Patch: none.

    Args:
        app: its ``openapi`` is replaced.
        extend: changes the schema in place.
    """
    openapi = app.openapi

    def openapi_and_extend() -> dict[str, Any]:
        is_new = app.openapi_schema is None
        schema = openapi()
        if is_new:
            extend(schema)
        return schema

    app.openapi = openapi_and_extend  # type: ignore[method-assign]


def insert_logger(manager: "StatLoggerManager", logger: "AggregateStatLoggerBase") -> None:
    """Make ``logger`` the first to receive statistics.

    vLLM's own loggers fail on ``SchedulerStats.kv_connector_stats`` without a KV connector, so the
    logger that removes them has to run first. A plugin of ``vllm.stat_logger_plugins`` could run
    first too, but it would enable statistics in every vLLM of the environment that runs with
    ``--disable-log-stats``. Patch: ``0002-custom-scheduler-stats``.

    Args:
        manager: its list ``stat_loggers`` is changed.
    """
    manager.stat_loggers.insert(0, logger)
