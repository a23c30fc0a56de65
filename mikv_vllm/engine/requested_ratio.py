"""The compression ratio that a request asks for."""

from vllm.logger import init_logger
from vllm.v1.request import Request

from mikv_vllm.config import RATIO_FIELD, RatioError, parse_ratio

logger = init_logger(__name__)


def requested_ratio(request: Request, default: float, largest: float) -> float:
    """Return the ratio of a request; 1.0 if it cannot be compressed.

    Args:
        default: ratio of requests without one.
        largest: largest ratio of the model.
    """
    # A resumable request gets more prompt tokens later; they need native pages.
    if request.sampling_params is None or request.resumable:
        return 1.0
    value = (request.sampling_params.extra_args or {}).get(RATIO_FIELD)
    if value is None:
        return default
    try:
        return parse_ratio(value, largest)
    except RatioError as error:
        # The front ends answer this with an error; here it would stop the engine.
        logger.warning("request %s stays uncompressed: %s", request.request_id, error)
        return 1.0
