"""MiKV in vLLM's API server: the middleware, ``GET /mikv/stats``, reports and metrics."""

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from starlette.datastructures import State
from vllm import envs
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from mikv_vllm.config import RATIO_FIELD, CompressionConfig, RatioError, parse_ratio
from mikv_vllm.server.capacity import check_capacity
from mikv_vllm.server.metrics import install_metrics
from mikv_vllm.server.middleware import RatioMiddleware
from mikv_vllm.server.openapi import describe_fields
from mikv_vllm.server.reports import collect_reports, current_request
from mikv_vllm.server.vllm_hooks import prepare_params
from mikv_vllm.tiers.plan import largest_ratio

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

STATS_METHOD = "mikv_stats"
"""Name of the worker method that returns the scheduler's statistics."""


class MiKVEndpoint:
    """Plugin for ``vllm.endpoint_plugins``; does nothing in a server that runs without MiKV."""

    name = "mikv"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the route, the middleware and the fields of the OpenAPI schema.

        vLLM adds its own middleware after this one. Middleware that is added later runs earlier, so
        requests are already authenticated when they reach this middleware.
        """
        if CompressionConfig.from_additional_config(app.state.args.additional_config) is None:
            return
        app.add_middleware(RatioMiddleware)
        app.include_router(_router(app.state.args))
        describe_fields(app)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Check requests, and collect reports and metrics, in this process's engine client."""
        config = CompressionConfig.from_additional_config(args.additional_config)
        if config is None or engine_client is None:
            return
        vllm_config = engine_client.vllm_config
        head_dim = vllm_config.model_config.get_head_size()
        state.mikv_largest_ratio = largest_ratio(head_dim, config.high_bits, config.ladder)
        engine: Any = engine_client
        apply_ratios(engine, state.mikv_largest_ratio)
        check_capacity(engine.input_processor, vllm_config, config)
        collect_reports(engine.output_processor, over_http=True)
        install_metrics(engine.logger_manager, vllm_config)


def apply_ratios(engine: "AsyncLLM", largest: float) -> None:
    """Make an ``AsyncLLM`` use the ratio of the HTTP request and refuse a wrong one.

    Args:
        engine: changed in place. It then sets the ratio of :data:`current_request`, and raises
            ``VLLMValidationError`` for a wrong ratio in the parameters.
        largest: the largest ratio of the served model.
    """

    def apply(params: Any) -> None:
        request = current_request.get()
        if isinstance(params, SamplingParams) and request and request.ratio is not None:
            params.extra_args = (params.extra_args or {}) | {RATIO_FIELD: request.ratio}
        ratio = (getattr(params, "extra_args", None) or {}).get(RATIO_FIELD)
        if ratio is not None:
            try:
                parse_ratio(ratio, largest)
            except RatioError as error:
                raise VLLMValidationError(str(error), parameter=RATIO_FIELD) from None

    prepare_params(engine, apply)


def _router(args: Namespace) -> APIRouter:
    """Return the routes under ``/mikv``, which require the API key if there is one.

    vLLM authenticates only requests to path prefixes that it knows. These routes therefore call its
    check themselves.
    """
    tokens = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]

    def authorize(request: Request) -> None:
        guard = AuthenticationMiddleware(request.app, tokens)
        if tokens and not guard.verify_token(request.headers):
            raise HTTPException(401, "Unauthorized")

    router = APIRouter(prefix="/mikv", dependencies=[Depends(authorize)])

    @router.get("/stats")
    async def stats(request: Request) -> dict[str, dict[str, int]]:
        """Pages, tokens, bytes, blocks and requests by state, and totals since the start."""
        return await engine_stats(request.app.state.engine_client)

    return router


async def engine_stats(engine: Any) -> dict[str, dict[str, int]]:
    """Return the statistics of all engines of an ``AsyncLLM``, summed.

    All workers of one engine return equal statistics; those of its first worker are used.

    Returns:
        Numbers by section and key, as in :class:`mikv_vllm.engine.step_plan.TierStats`.
    """
    per_engine = await engine.engine_core.call_utility_all_async(
        "collective_rpc", STATS_METHOD, None, (), None
    )
    total: dict[str, dict[str, int]] = {}
    for workers in per_engine:
        for section, figures in workers[0].items():
            sums = total.setdefault(section, {})
            for key, value in figures.items():
                sums[key] = sums.get(key, 0) + value
    return total
