"""The ratio in a request's body."""

import json

import pytest

from mikv_vllm.config import RatioError
from mikv_vllm.server.request_body import move_ratio


def moved(body: bytes) -> dict:
    return json.loads(move_ratio(body, largest=6.0))


def test_top_level_ratio_moves_into_xargs():
    assert moved(b'{"prompt": "a", "kv_compression_ratio": 4}') == {
        "prompt": "a",
        "vllm_xargs": {"kv_compression_ratio": 4.0},
    }


def test_other_xargs_stay():
    body = b'{"kv_compression_ratio": 4.0, "vllm_xargs": {"other": [1, "b"]}}'
    assert moved(body) == {"vllm_xargs": {"other": [1, "b"], "kv_compression_ratio": 4.0}}


def test_ratio_in_xargs_stays_there():
    assert moved(b'{"vllm_xargs": {"kv_compression_ratio": 1}}') == {
        "vllm_xargs": {"kv_compression_ratio": 1.0}
    }


@pytest.mark.parametrize(
    "body",
    [
        b'{"kv_compression_ratio": null}',
        b'{"vllm_xargs": {"kv_compression_ratio": null}}',
        b'{"kv_compression_ratio": null, "vllm_xargs": {"kv_compression_ratio": null}}',
    ],
)
def test_null_means_absent(body):
    assert "kv_compression_ratio" not in json.dumps(moved(body))


def test_null_in_one_place_leaves_the_other():
    body = b'{"kv_compression_ratio": null, "vllm_xargs": {"kv_compression_ratio": 2.0}}'
    assert moved(body) == {"vllm_xargs": {"kv_compression_ratio": 2.0}}


def test_the_same_ratio_twice_is_fine():
    body = b'{"kv_compression_ratio": 4, "vllm_xargs": {"kv_compression_ratio": 4.0}}'
    assert moved(body) == {"vllm_xargs": {"kv_compression_ratio": 4.0}}


def test_two_different_ratios_are_refused():
    body = b'{"kv_compression_ratio": 4, "vllm_xargs": {"kv_compression_ratio": 3}}'
    with pytest.raises(RatioError, match=r"is 4, but vllm_xargs\.kv_compression_ratio is 3"):
        move_ratio(body, largest=6.0)


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-1", "0.99", "6.01", '"four"', '""', "true", "[4]", '{"a": 4}']
)
@pytest.mark.parametrize(
    "template", ['{"kv_compression_ratio": %s}', '{"vllm_xargs": {"kv_compression_ratio": %s}}']
)
def test_wrong_ratio_names_field_value_and_range(template, value):
    with pytest.raises(RatioError, match=r"kv_compression_ratio is .*from 1\.0 .* to 6\."):
        move_ratio((template % value).encode(), largest=6.0)


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
    assert move_ratio(body, largest=6.0) is body


def test_xargs_of_a_wrong_type_are_left_for_vllm_to_refuse():
    assert moved(b'{"kv_compression_ratio": 4, "vllm_xargs": "x"}') == {"vllm_xargs": "x"}


def test_everything_else_survives():
    request = {"prompt": "\u00e9\ud800\n", "seed": 2**70, "top_p": 0.1, "stop": ["\u2028"]}
    body = json.dumps(request | {"kv_compression_ratio": 2}).encode()
    assert moved(body) == request | {"vllm_xargs": {"kv_compression_ratio": 2.0}}
