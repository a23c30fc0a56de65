"""Random requests of every kind, and what has to be true of their answers."""

import random
from dataclasses import dataclass
from typing import Any

from mikv_vllm.config import RATIO_FIELD, REPORT_FIELD
from mikv_vllm.evaluation.windows import topics_text

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
WRONG_RATIOS = ("4", True, [4.0], {}, 0.5, -2.0, 1e9, float("nan"), float("inf"))
STOPS = (["the"], ["\n\n"], [".", ":"], ["object", "class"])
CHARS_PER_TOKEN = 3
"""Cautious for the Python reference, so that no prompt outgrows its length in tokens."""
DISCONNECTING, WRONG, SHARED_PREFIX = 0.15, 0.06, 0.4
"""Shares of the requests."""


@dataclass(frozen=True)
class Request:
    """One HTTP request and what its answer has to be."""

    route: str
    body: dict[str, Any]
    wrong: bool
    """Its ratio is wrong: the answer is 400."""
    ratio: float | None
    """The requested ratio; None if it names none, or a wrong one."""
    disconnect_after: float | None
    """Seconds until the client hangs up, unless the answer is there by then."""

    @property
    def stream(self) -> bool:
        return self.body.get("stream", False)

    @property
    def choices(self) -> int:
        return self.body.get("n", 1)


def random_requests(
    seed: int, count: int, model: str, largest_ratio: float, longest_prompt: int = 1500
) -> list[Request]:
    """``count`` requests, the same for the same seed.

    Args:
        seed: of the random numbers.
        count: how many.
        model: name of the served model.
        largest_ratio: right ratios lie between 1 and this.
        longest_prompt: tokens; the shortest has about 100, and most are short.
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
    """What is wrong with the answer to a request with a wrong ratio."""
    error = answer.get("error") if isinstance(answer, dict) else None
    if status != 400 or not isinstance(error, dict):
        return [f"ratio {request.body[RATIO_FIELD]!r} was answered with {status}: {answer}"]
    if error.get("param") != RATIO_FIELD or RATIO_FIELD not in error.get("message", ""):
        return [f"the 400 for a wrong ratio names no {RATIO_FIELD}: {error}"]
    return []


def faults_of_answer(request: Request, answer: dict[str, Any], default_ratio: float) -> list[str]:
    """What is wrong with a whole answer's report.

    Args:
        request: what was asked.
        answer: the body, or the last event of a stream.
        default_ratio: of a request that names none.
    """
    answer = answer.get("response", answer)  # the last event of /v1/responses wraps it
    report = answer.get(REPORT_FIELD)
    if not isinstance(report, dict):
        return [f"no {REPORT_FIELD} in {answer}"]
    usage = answer.get("usage") or {}
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
    new = usage.get("completion_tokens", usage.get("output_tokens"))
    if prompt is None or new is None:
        return [f"no usage in {answer}"]

    # A sequence's last token is never cached. One or two steps past a stop string may be.
    cached = request.choices * (prompt - 1) + new
    tiered = report["high_tokens"] + report["low_tokens"]
    stored, uncompressed = report["kv_bytes"], report["uncompressed_kv_bytes"]
    ratio = default_ratio if request.ratio is None else request.ratio
    untouched = report["low_format"] is None
    # With several choices some may be compressed and some be too short for it.
    tiered_fits = 0 < tiered <= report["kv_tokens"]
    if request.choices == 1:
        tiered_fits = tiered == report["kv_tokens"]
    claims = {
        "requested_ratio is what was asked": report["requested_ratio"] == ratio,
        "kv_tokens fits the usage": 0 <= report["kv_tokens"] - cached <= 2 * request.choices,
        "high and low tokens fit kv_tokens": tiered == 0 if untouched else tiered_fits,
        "an untouched cache keeps its bytes": not untouched or stored == uncompressed,
        "a compressed cache is smaller": untouched or stored < uncompressed,
        "ratio 1 is untouched": ratio > 1.0 or untouched,
        "every token takes the same bytes": uncompressed % report["kv_tokens"] == 0,
        "achieved_ratio is the quotient of the bytes": (
            abs(report["achieved_ratio"] - uncompressed / stored) < 1e-3
        ),
    }
    return [
        f"not so: {claim} (ratio {ratio}, n {request.choices}, {usage}, {report})"
        for claim, holds in claims.items()
        if not holds
    ]
