"""The ratio in a request's body."""

import json

import pytest

from mikv_vllm.config import RatioError
from mikv_vllm.server.request_body import put_into_xargs, refuse_ratio, take_ratio


def taken(body: bytes, header: str | None = None) -> tuple[dict, float | None]:
    request = take_ratio(body, header, largest=6.0)
    assert request.is_set == (request.ratio is not None)
    return json.loads(request.body), request.ratio


@pytest.mark.parametrize(
    ("body", "rest"),
    [
        (b'{"prompt": "a", "kv_compression_ratio": 4}', {"prompt": "a"}),
        (
            b'{"vllm_xargs": {"other": [1, "b"], "kv_compression_ratio": 4.0}}',
            {"vllm_xargs": {"other": [1, "b"]}},
        ),
        (b'{"sampling_params": {"kv_compression_ratio": "4"}}', {"sampling_params": {}}),
        (
            b'{"sampling_params": {"extra_args": {"kv_compression_ratio": 4}}}',
            {"sampling_params": {"extra_args": {}}},
        ),
    ],
)
def test_ratio_is_taken_from_every_place(body, rest):
    assert taken(body) == (rest, 4.0)


@pytest.mark.parametrize(
    "body",
    [
        b'{"kv_compression_ratio": null}',
        b'{"vllm_xargs": {"kv_compression_ratio": null}}',
        b'{"kv_compression_ratio": null, "vllm_xargs": {"kv_compression_ratio": null}}',
    ],
)
def test_null_means_absent(body):
    rest, ratio = taken(body)
    assert ratio is None
    assert "kv_compression_ratio" not in json.dumps(rest)


def test_null_in_one_place_leaves_the_other():
    body = b'{"kv_compression_ratio": null, "vllm_xargs": {"kv_compression_ratio": 2.0}}'
    assert taken(body) == ({"vllm_xargs": {}}, 2.0)


def test_the_same_ratio_in_several_places_is_fine():
    body = b'{"kv_compression_ratio": 4, "vllm_xargs": {"kv_compression_ratio": 4.0}}'
    assert taken(body, header="4.0")[1] == 4.0


def test_two_different_ratios_are_refused():
    body = b'{"kv_compression_ratio": 4, "vllm_xargs": {"kv_compression_ratio": 3}}'
    with pytest.raises(RatioError, match=r"is 4, but vllm_xargs\.kv_compression_ratio is 3"):
        take_ratio(body, None, largest=6.0)
    with pytest.raises(RatioError, match=r"^x-kv-compression-ratio is 2, but kv_compression_ratio"):
        take_ratio(body, "2", largest=6.0)


@pytest.mark.parametrize("header", ["", "four", "nan", "0.5", "7", "4, 4"])
def test_a_wrong_header_is_named(header):
    with pytest.raises(RatioError, match=r"^x-kv-compression-ratio is .*from 1\.0 .* to 6\."):
        take_ratio(b"{}", header, largest=6.0)


def test_the_ratio_of_a_rendered_request_is_in_xargs():
    assert json.loads(put_into_xargs(b"{}", 4.0)) == {"vllm_xargs": {"kv_compression_ratio": 4.0}}
    assert json.loads(put_into_xargs(b'{"vllm_xargs": {"a": 1}}', 4.0)) == {
        "vllm_xargs": {"a": 1, "kv_compression_ratio": 4.0}
    }
    assert put_into_xargs(b'{"vllm_xargs": "x"}', 4.0) == b'{"vllm_xargs": "x"}'


@pytest.mark.parametrize("body", [b"", b"{bad", b'{"input": "kv_compression_ratio"}', b"[1]"])
def test_other_routes_take_other_bodies(body):
    refuse_ratio(body, None, "/v1/embeddings")


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-1", "0.99", "6.01", '"four"', '""', "true", "[4]", '{"a": 4}']
)
@pytest.mark.parametrize(
    "template", ['{"kv_compression_ratio": %s}', '{"vllm_xargs": {"kv_compression_ratio": %s}}']
)
def test_wrong_ratio_names_field_value_and_range(template, value):
    with pytest.raises(RatioError, match=r"kv_compression_ratio is .*from 1\.0 .* to 6\."):
        take_ratio((template % value).encode(), None, largest=6.0)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{bad",
        b"[1, 2]",
        b"\xff\xfe",
        b'{"prompt": "a",  "temperature": NaN}',
        b'{"prompt": "kv_compression_ratio"}',
        b'{"vllm_xargs": "kv_compression_ratio"}',
        b"[" * 100_000,
    ],
)
def test_body_without_ratio_is_not_touched(body):
    assert take_ratio(body, None, largest=6.0) == (body, None, False)
    assert take_ratio(body, None, largest=6.0).body is body


def test_xargs_of_a_wrong_type_are_left_for_vllm_to_refuse():
    body = b'{"kv_compression_ratio": 4, "vllm_xargs": "x"}'
    assert taken(body) == ({"vllm_xargs": "x"}, 4.0)


def test_everything_else_survives():
    request = {"prompt": "\u00e9\ud800\n", "seed": 2**70, "top_p": 0.1, "stop": ["\u2028"]}
    body = json.dumps(request | {"kv_compression_ratio": 2}).encode()
    assert taken(body) == (request, 2.0)
