"""Reads the ratio of an HTTP request from its JSON body and its header."""

import json
from difflib import get_close_matches
from typing import Any, NamedTuple

from mikv_vllm.config import RATIO_FIELD, RatioError, parse_ratio

RATIO_HEADER = "x-kv-compression-ratio"
"""Header with the ratio, for clients that cannot add a field to the body."""
XARGS_FIELD = "vllm_xargs"
"""vLLM's field for extra sampling arguments; its entries reach ``SamplingParams.extra_args``."""
PLACES = ((), (XARGS_FIELD,), ("sampling_params",), ("sampling_params", "extra_args"))
"""Objects of a body that may contain the ratio, as paths of field names."""
OTHER_FIELDS = ("kv_transfer_params", "kv_cache_report_mode")
"""Fields of vLLM that begin with ``kv_``."""


class RatioRequest(NamedTuple):
    """A request without its ratio, and the ratio."""

    body: bytes
    """The body; the received object itself if it contained no ratio."""
    ratio: float | None
    """None for the server's default."""
    is_set: bool
    """Whether the request sets the ratio."""


def take_ratio(body: bytes, header: str | None, largest: float) -> RatioRequest:
    """Remove the ratio from a request.

    A body that is not a JSON object is returned unchanged: vLLM reports what is wrong with it. A
    null means that the field is missing.

    Args:
        body: body of the request, as received.
        header: value of :data:`RATIO_HEADER`, or None.
        largest: the largest ratio of the served model.

    Raises:
        RatioError: a ratio is not a number, is out of range, or differs from another one of the
            same request; a field looks like a misspelt ``kv_compression_ratio``; or the request
            uses beam search, which computes every token of a beam in a short request of its own, so
            that nothing is compressed.
    """
    found = {}
    if header is not None:
        found[RATIO_HEADER] = parse_ratio(header, largest, RATIO_HEADER)
    request = _json_object(body)
    is_changed = False
    for path in PLACES:
        fields = _object_at(request, path)
        prefix = "".join(f"{name}." for name in path)
        _check_names(fields, prefix)
        if RATIO_FIELD in fields:
            is_changed = True
            value = fields.pop(RATIO_FIELD)
            if value is not None:
                found[prefix + RATIO_FIELD] = parse_ratio(value, largest, prefix + RATIO_FIELD)
    first, ratio = next(iter(found.items()), ("", None))
    for place, other in found.items():
        if other != ratio:
            raise RatioError(f"{first} is {ratio:g}, but {place} is {other:g}; give one of them.")
    if is_changed:
        body = json.dumps(request).encode()
    if request.get("use_beam_search"):
        if ratio is not None and ratio > 1:
            raise RatioError(f"{first} is {ratio:g}, but it must be 1 with use_beam_search.")
        return RatioRequest(body, 1.0, is_set=False)
    return RatioRequest(body, ratio, is_set=ratio is not None)


def refuse_ratio(body: bytes, header: str | None, path: str) -> None:
    """Refuse a ratio in a request to a route that cannot apply it.

    Raises:
        RatioError: the header or the JSON body contains a ratio.
    """
    is_set = header is not None
    if not is_set and RATIO_FIELD.encode() in body:
        request = _json_object(body)
        is_set = any(RATIO_FIELD in _object_at(request, place) for place in PLACES)
    if is_set:
        raise RatioError(f"{RATIO_FIELD} is not supported by POST {path}.")


def put_into_xargs(body: bytes, ratio: float) -> bytes:
    """Return a body with the ratio in ``vllm_xargs``, the field that vLLM's routes forward."""
    request = _json_object(body)
    if request.get(XARGS_FIELD) is None:
        request[XARGS_FIELD] = {}
    if not isinstance(request[XARGS_FIELD], dict):
        return body  # vLLM refuses other types
    request[XARGS_FIELD][RATIO_FIELD] = ratio
    return json.dumps(request).encode()


def _json_object(body: bytes) -> dict[str, Any]:
    """Return the object in a body, empty if there is none."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return request if isinstance(request, dict) else {}


def _object_at(request: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for name in path:
        inner = request.get(name)
        request = inner if isinstance(inner, dict) else {}
    return request


def _check_names(fields: dict[str, Any], prefix: str) -> None:
    """Refuse unknown names that begin with ``kv_`` or are similar to ``kv_compression_ratio``.

    vLLM ignores unknown fields, so the request would silently stay uncompressed.
    """
    for name in fields:
        if name == RATIO_FIELD or name in OTHER_FIELDS:
            continue
        if name.startswith("kv_") or get_close_matches(name, [RATIO_FIELD], cutoff=0.85):
            raise RatioError(f"unknown field {prefix}{name}; did you mean {prefix}{RATIO_FIELD}?")
