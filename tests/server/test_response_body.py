"""Reports in JSON bodies and in event streams."""

import json

import pytest

from mikv_vllm.server.response_body import EventStream, header_value, rewrite_json

REPORT = {"requested_ratio": 4.0, "achieved_ratio": 3.9, "kv_tokens": 10}


def event(**content) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


def token(text: str, finish: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": text, "finish_reason": finish}])


def contents(stream: bytes) -> list:
    parts = [part for part in stream.split(b"\n\n") if part.startswith(b"data: {")]
    return [json.loads(part.removeprefix(b"data: ")) for part in parts]


USAGE = event(choices=[], usage={"total_tokens": 3})
DONE = b"data: [DONE]\n\n"


def run(events: list[bytes], report: dict | None = REPORT) -> tuple[list[bytes], EventStream]:
    stream = EventStream(lambda: report)
    return [stream.feed(data) for data in events], stream


def rewritten(body: str, report: dict | None) -> dict:
    new, shown = rewrite_json(body.encode(), report)
    assert shown == REPORT
    assert json.loads(header_value(shown)) == REPORT
    return json.loads(new)


def test_report_is_in_the_usage_too():
    body = '{"usage": {"total_tokens": 3}}'
    assert rewritten(body, REPORT)["usage"] == {"total_tokens": 3, "kv_compression": REPORT}


def test_report_moves_from_the_carrier_to_the_top_level():
    body = json.dumps({"id": "a", "kv_transfer_params": {"kv_compression": {"kv_tokens": 1}}})
    assert rewritten(body, REPORT) == {
        "id": "a",
        "kv_transfer_params": None,
        "kv_compression": REPORT,
    }


def test_report_of_the_carrier_is_used_if_no_other_is_given():
    body = json.dumps({"kv_transfer_params": {"kv_compression": REPORT, "other": 1}})
    assert rewritten(body, None) == {
        "kv_transfer_params": {"other": 1},
        "kv_compression": REPORT,
    }


@pytest.mark.parametrize("body", [b'{"id":  "a"}', b"[1]", b"not JSON", b""])
def test_json_body_without_a_report_is_unchanged(body):
    assert rewrite_json(body, None) == (body, None)


def test_tokens_are_not_delayed():
    out, _ = run([token("a"), token("b")])
    assert out == [token("a"), token("b")]


def test_report_is_in_the_last_event_before_done():
    out, _ = run([token("a"), token("b", "stop"), DONE])
    assert out[1] == b""
    assert contents(out[2])[0]["kv_compression"] == REPORT
    assert out[2].endswith(DONE)


def test_report_is_only_in_the_usage_event():
    out, _ = run([token("a", "stop"), USAGE, DONE])
    events = contents(b"".join(out))
    assert [e.get("kv_compression") == REPORT for e in events] == [False, True]
    assert events[1]["usage"] == {"total_tokens": 3, "kv_compression": REPORT}


def test_report_is_only_in_the_end_of_the_last_choice():
    out, _ = run([token("a", "stop"), token("b"), token("c", "length"), DONE])
    events = contents(b"".join(out))
    assert [e.get("kv_compression") == REPORT for e in events] == [False, False, True]


def test_stream_without_a_report_is_unchanged():
    events = [token("a"), token("b", "stop"), USAGE, DONE]
    out, _ = run(events, report=None)
    assert b"".join(out) == b"".join(events)


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_events_may_be_split_anywhere(size):
    whole = token("é") + token("b", "stop") + DONE
    out, stream = run([whole[i : i + size] for i in range(0, len(whole), size)])
    assert stream.end() == b""
    assert [e.get("kv_compression") for e in contents(b"".join(out))] == [None, REPORT]


def test_interrupted_stream_loses_no_bytes():
    out, stream = run([token("a", "stop"), b"data: {"])
    assert b"".join(out) + stream.end() == token("a", "stop") + b"data: {"


def test_keep_alive_overtakes_a_delayed_event():
    out, _ = run([token("a", "stop"), b": keep-alive\n\n", DONE])
    assert out[1] == b": keep-alive\n\n"
    assert contents(out[2])[0]["kv_compression"] == REPORT


def test_error_event_before_done_is_unchanged():
    error = event(error={"message": "x"})
    out, _ = run([token("a"), error, DONE])
    assert out[1:] == [error, DONE]


@pytest.mark.parametrize("kind", ["completed", "incomplete", "failed"])
def test_responses_stream_has_the_report_in_its_last_event(kind):
    head = f"event: response.{kind}\n".encode()
    last = head + event(type=f"response.{kind}", response={"kv_transfer_params": None})
    out, _ = run([b"event: response.created\n" + event(response={}), last])
    assert "kv_compression" not in contents(out[0])
    assert out[1].startswith(head)
    content = json.loads(out[1].partition(b"data: ")[2])
    assert content["response"]["kv_compression"] == content["kv_compression"] == REPORT


def test_messages_stream_has_the_report_in_the_event_with_the_usage():
    delta = b"event: message_delta\n" + event(type="message_delta", usage={"output_tokens": 3})
    stop = b"event: message_stop\n" + event(type="message_stop")
    out, _ = run([b"event: message_start\n" + event(type="message_start"), delta, stop])
    assert out[2] == stop
    content = json.loads(out[1].partition(b"data: ")[2])
    assert content["usage"] == {"output_tokens": 3, "kv_compression": REPORT}
