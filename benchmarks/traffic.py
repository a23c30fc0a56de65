"""Random requests for the soak test, and checks of their answers."""

import random
from dataclasses import dataclass
from typing import Any

from mikv_vllm.config import RATIO_FIELD, REPORT_FIELD
from mikv_vllm.evaluation.windows import topics_text

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
WRONG_RATIOS = ("four", True, [4.0], {}, 0.5, -2.0, 1e9, float("nan"), float("inf"))
STOPS = (["the"], ["\n\n"], [".", ":"], ["object", "class"])
CHARS_PER_TOKEN = 3
"""Low estimate for the Python reference, so that no prompt is longer than intended."""
DISCONNECTING, WRONG, SHARED_PREFIX = 0.15, 0.06, 0.4
"""Shares of requests whose client disconnects, that have a wrong ratio, or share a prefix."""


@dataclass(frozen=True)
class Request:
    """An HTTP request and what is expected of its answer."""

    route: str
    body: dict[str, Any]
    wrong: bool
    """Whether its ratio is invalid, so that status 400 is expected."""
    ratio: float | None
    """Requested ratio; None if the request has none, or an invalid one."""
    disconnect_after: float | None
    """Seconds after which the client disconnects if the answer is not complete; None for never."""

    @property
    def stream(self) -> bool:
        return self.body.get("stream", False)

    @property
    def choices(self) -> int:
        return self.body.get("n", 1)


def random_requests(
    seed: int, count: int, model: str, largest_ratio: float, longest_prompt: int = 1500
) -> list[Request]:
    """Return random requests, the same ones for the same arguments.

    Args:
        seed: seed of the random numbers.
        count: number of requests.
        model: name of the served model.
        largest_ratio: largest valid ratio in the requests.
        longest_prompt: tokens of the longest prompt. The shortest has about 100 tokens, and most
            prompts are short.
    """
    rng = random.Random(seed)
    text = topics_text()
    return [_random_request(rng, text, model, largest_ratio, longest_prompt) for _ in range(count)]


def _random_request(
    rng: random.Random, text: str, model: str, largest_ratio: float, longest_prompt: int
) -> Request:
    tokens = 100 + (longest_prompt - 100) * rng.random() ** 2.5
    length = int(tokens * CHARS_PER_TOKEN)
    starts = range(0, 40_000, 10_000) if rng.random() < SHARED_PREFIX else range(len(text) - length)
    start = rng.choice(starts)
    prompt = text[start : start + length]

    route = rng.choices((COMPLETIONS, CHAT, RESPONSES), (6, 3, 1))[0]
    new_tokens = int(1 + 119 * rng.random() ** 2)
    body: dict[str, Any] = {"model": model, "temperature": rng.choice((0.0, 0.8))}
    if route == RESPONSES:
        body |= {"input": prompt, "max_output_tokens": new_tokens}
    elif route == CHAT:
        messages = [{"role": "user", "content": prompt}]
        body |= {"messages": messages, "max_tokens": new_tokens}
    else:
        body |= {"prompt": prompt, "max_tokens": new_tokens, "ignore_eos": rng.random() < 0.5}
    if rng.random() < 0.4:
        body["stream"] = True
        if route != RESPONSES:
            body["stream_options"] = {"include_usage": True}
    if route != RESPONSES:
        if rng.random() < 0.2:
            body["stop"] = rng.choice(STOPS)
        if rng.random() < 0.15:
            body |= {"n": rng.choice((2, 3)), "temperature": 0.8}

    ratio: float | None = None
    wrong = rng.random() < WRONG
    if wrong:
        body[RATIO_FIELD] = rng.choice(WRONG_RATIOS)
    elif rng.random() < 0.9:
        choices = (1.0, 4.0, round(rng.uniform(1.0, largest_ratio), 2), largest_ratio)
        ratio = body[RATIO_FIELD] = rng.choices(choices, (2, 2, 5, 1))[0]
    disconnects = not wrong and rng.random() < DISCONNECTING
    return Request(route, body, wrong, ratio, rng.expovariate(1 / 1.5) if disconnects else None)


def faults_of_refusal(request: Request, status: int, answer: Any) -> list[str]:
    """Return the faults of the answer to a request with an invalid ratio, as sentences."""
    error = answer.get("error") if isinstance(answer, dict) else None
    if status != 400 or not isinstance(error, dict):
        return [f"ratio {request.body[RATIO_FIELD]!r} was answered with status {status}: {answer}"]
    if error.get("param") != RATIO_FIELD or RATIO_FIELD not in error.get("message", ""):
        return [f"the error for an invalid ratio does not name {RATIO_FIELD}: {error}"]
    return []


def faults_of_answer(request: Request, answer: dict[str, Any], default_ratio: float) -> list[str]:
    """Return the faults of the report in a complete answer, as sentences.

    Args:
        request: the request.
        answer: body, or last event of the stream.
        default_ratio: ratio of a request that does not have one.
    """
    answer = answer.get("response", answer)  # the last event of /v1/responses wraps it
    report = answer.get(REPORT_FIELD)
    if request.ratio is None and default_ratio == 1:
        return [] if report is None else [f"a {REPORT_FIELD} without a ratio in {answer}"]
    if not isinstance(report, dict):
        return [f"no {REPORT_FIELD} in {answer}"]
    usage = answer.get("usage") or {}
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
    new = usage.get("completion_tokens", usage.get("output_tokens"))
    if prompt is None or new is None:
        return [f"no usage in {answer}"]

    # The last token of a sequence is never cached. One or two tokens after a stop string can be.
    cached = request.choices * (prompt - 1) + new
    tiered = report["high_tokens"] + report["low_tokens"]
    stored, uncompressed = report["kv_bytes"], report["uncompressed_kv_bytes"]
    ratio = default_ratio if request.ratio is None else request.ratio
    native = report["low_format"] is None
    # With several choices, some can be too short for compression.
    tiered_fits = 0 < tiered <= report["kv_tokens"]
    if request.choices == 1:
        tiered_fits = tiered == report["kv_tokens"]
    claims = {
        "requested_ratio is the ratio of the request": report["requested_ratio"] == ratio,
        "kv_tokens fits the usage": 0 <= report["kv_tokens"] - cached <= 2 * request.choices,
        "high_tokens and low_tokens match kv_tokens": tiered == 0 if native else tiered_fits,
        "an uncompressed cache keeps its bytes": not native or stored == uncompressed,
        "a compressed cache is smaller": native or stored < uncompressed,
        "ratio 1 is uncompressed": ratio > 1.0 or native,
        "all tokens have the same uncompressed bytes": uncompressed % report["kv_tokens"] == 0,
        "achieved_ratio is uncompressed bytes divided by stored bytes": (
            abs(report["achieved_ratio"] - uncompressed / stored) < 1e-3
        ),
    }
    return [
        f"does not hold: {claim} (ratio {ratio}, n {request.choices}, {usage}, {report})"
        for claim, holds in claims.items()
        if not holds
    ]
