"""Reads the ratio from the JSON body of a request, and moves it to a field that vLLM forwards."""

import json
from difflib import get_close_matches
from typing import Any

from mikv_vllm.config import RATIO_FIELD, RatioError, parse_ratio

XARGS_FIELD = "vllm_xargs"
"""vLLM's field for extra sampling arguments; its entries reach ``SamplingParams.extra_args``."""
OTHER_FIELDS = ("kv_transfer_params", "kv_cache_report_mode")
"""Fields of vLLM that begin with ``kv_``."""


def move_ratio(body: bytes, largest: float) -> bytes:
    """Move a top-level ``kv_compression_ratio`` into ``vllm_xargs``.

    A body without the field, or one that is not a JSON object, is returned unchanged: vLLM reports
    what is wrong with it. A null means that the field is missing.

    Args:
        body: body of a request, as received.
        largest: the largest ratio of the served model.

    Raises:
        RatioError: the ratio is not a number, out of range, or given twice with different values;
            or a field looks like a misspelt ``kv_compression_ratio``.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return body
    if not isinstance(request, dict):
        return body
    xargs = request.get(XARGS_FIELD)
    inner_args = xargs if isinstance(xargs, dict) else {}
    _check_names(request, "")
    _check_names(inner_args, f"{XARGS_FIELD}.")
    if RATIO_FIELD not in request and RATIO_FIELD not in inner_args:
        return body
    ratio = _checked(request.pop(RATIO_FIELD, None), largest, RATIO_FIELD)
    if RATIO_FIELD in inner_args:
        inner_field = f"{XARGS_FIELD}.{RATIO_FIELD}"
        inner = _checked(inner_args.pop(RATIO_FIELD), largest, inner_field)
        if ratio is not None and inner is not None and ratio != inner:
            raise RatioError(
                f"{RATIO_FIELD} is {ratio:g}, but {inner_field} is {inner:g}; give one of them."
            )
        ratio = inner if ratio is None else ratio
    if ratio is not None:
        if xargs is None:
            xargs = request[XARGS_FIELD] = {}
        if isinstance(xargs, dict):  # vLLM refuses other types
            xargs[RATIO_FIELD] = ratio
    return json.dumps(request).encode()


def _checked(value: Any, largest: float, field: str) -> float | None:
    return None if value is None else parse_ratio(value, largest, field)


def _check_names(fields: dict[str, Any], prefix: str) -> None:
    """Refuse unknown names that begin with ``kv_`` or are similar to ``kv_compression_ratio``.

    vLLM ignores unknown fields, so the request would silently stay uncompressed.
    """
    for name in fields:
        if name == RATIO_FIELD or name in OTHER_FIELDS:
            continue
        if name.startswith("kv_") or get_close_matches(name, [RATIO_FIELD], cutoff=0.85):
            raise RatioError(f"unknown field {prefix}{name}; did you mean {prefix}{RATIO_FIELD}?")
