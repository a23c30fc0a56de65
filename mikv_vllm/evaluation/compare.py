"""A running server's answers to the same prompts at several ratios: what they share, cost and take.

Answers are greedy. Two of them that differ in one token go on from different texts, so
probabilities are compared only up to there.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from uuid import uuid4

import openai

from mikv_vllm.config import RATIO_FIELD, REPORT_FIELD
from mikv_vllm.evaluation.json_lines import read_texts
from mikv_vllm.evaluation.windows import topics_text

PROMPT_CHARACTERS = 6000


@dataclass(frozen=True)
class Answer:
    """One answer of a server: tokens as text, with log-probabilities in nats."""

    tokens: list[str]
    log_probs: list[float]
    first_token_seconds: float
    seconds: float
    report: dict

    @property
    def token_seconds(self) -> float:
        """Time per token after the first."""
        return (self.seconds - self.first_token_seconds) / max(1, len(self.tokens) - 1)


@dataclass(frozen=True)
class Comparison:
    """One ratio against ratio 1, means over prompts."""

    ratio: float
    achieved_ratio: float
    kv_bytes: float
    """Of one request."""
    shared: float
    """Share of the answer's tokens before the first that differs."""
    same: float
    """Share of answers that are the same to the end."""
    log_prob_difference: float
    """Mean difference of the shared tokens' log-probabilities, without sign, nats."""
    first_token_seconds: float
    token_seconds: float


def read_prompts(path: Path | None, count: int) -> list[str]:
    """Prompts of a file of JSON lines, ``{"prompt": …}``, or ``count`` pieces of our own text.

    Raises:
        ValueError: a line is something else, or there is none.
    """
    if path is None:
        text = topics_text()
        stride = (len(text) - PROMPT_CHARACTERS) // count
        return [text[i * stride :][:PROMPT_CHARACTERS] for i in range(count)]
    return [prompt for (prompt,) in read_texts(path, ("prompt",), "--prompts")]


class Server:
    """An OpenAI-compatible server.

    Args:
        url: without ``/v1``.
        model: None for the first that it serves.

    Raises:
        ValueError: it cannot be reached, or refuses.
    """

    def __init__(self, url: str, api_key: str | None, model: str | None, max_tokens: int) -> None:
        self._url, self._max_tokens = url, max_tokens
        self._client = openai.OpenAI(
            base_url=f"{url.rstrip('/')}/v1", api_key=api_key or "none", max_retries=0
        )
        try:
            self.model = model or self._client.models.list().data[0].id
        except openai.OpenAIError as error:
            raise ValueError(f"--url: {url} does not answer: {error}") from None

    def ask(self, prompt: str, ratio: float) -> Answer:
        """One answer at a ratio; no prefix cache takes part, since that would spare one of them."""
        begin = time.perf_counter()
        first: float | None = None
        tokens: list[str] = []
        log_probs: list[float] = []
        report = None
        try:
            for chunk in self._client.completions.create(
                model=self.model,
                prompt=prompt,
                max_tokens=self._max_tokens,
                temperature=0,
                logprobs=1,
                stream=True,
                extra_body={RATIO_FIELD: ratio, "cache_salt": uuid4().hex},
            ):
                for choice in chunk.choices:
                    if choice.logprobs is not None and choice.logprobs.tokens:
                        first = first or time.perf_counter()
                        tokens += choice.logprobs.tokens
                        log_probs += [p or 0.0 for p in choice.logprobs.token_logprobs or []]
                report = (chunk.model_extra or {}).get(REPORT_FIELD, report)
        except openai.OpenAIError as error:
            raise ValueError(f"{self._url}, ratio {ratio:g}: {error}") from None
        if report is None:
            raise ValueError(f"--url: {self._url} reports no {REPORT_FIELD}; is it mikv-serve?")
        end = time.perf_counter()
        return Answer(tokens, log_probs, (first or end) - begin, end - begin, report)


def compare(
    server: Server, prompts: list[str], ratios: list[float]
) -> Iterator[tuple[float, Answer, Answer]]:
    """Yield each ratio's answer to each prompt beside that at ratio 1.

    The ratios take turns on every prompt, so that what else the machine does meets all of them.
    """
    for prompt in prompts:
        reference = server.ask(prompt, 1.0)
        for ratio in ratios:
            yield ratio, server.ask(prompt, ratio), reference


def summarize(answers: list[tuple[float, Answer, Answer]]) -> list[Comparison]:
    """Means over prompts, by ratio."""
    found = []
    for ratio in dict.fromkeys(ratio for ratio, _, _ in answers):
        pairs = [(mine, theirs) for other, mine, theirs in answers if other == ratio]
        shared = [_shared(mine, theirs) for mine, theirs in pairs]
        differences = [
            abs(a - b)
            for (mine, theirs), count in zip(pairs, shared, strict=True)
            for a, b in zip(mine.log_probs[:count], theirs.log_probs[:count], strict=True)
        ]
        lengths = [max(1, len(mine.tokens), len(theirs.tokens)) for mine, theirs in pairs]
        stored = sum(mine.report["kv_bytes"] for mine, _ in pairs)
        native = sum(mine.report["uncompressed_kv_bytes"] for mine, _ in pairs)
        found.append(
            Comparison(
                ratio=ratio,
                achieved_ratio=native / stored,
                kv_bytes=stored / len(pairs),
                shared=fmean(n / length for n, length in zip(shared, lengths, strict=True)),
                same=fmean(mine.tokens == theirs.tokens for mine, theirs in pairs),
                log_prob_difference=fmean(differences) if differences else 0.0,
                first_token_seconds=fmean(mine.first_token_seconds for mine, _ in pairs),
                token_seconds=fmean(mine.token_seconds for mine, _ in pairs),
            )
        )
    return found


def _shared(mine: Answer, theirs: Answer) -> int:
    """Tokens before the first that differs."""
    pairs = zip(mine.tokens, theirs.tokens, strict=False)
    different = (i for i, (a, b) in enumerate(pairs) if a != b)
    return next(different, min(len(mine.tokens), len(theirs.tokens)))


def rows(comparisons: list[Comparison]) -> list[dict]:
    """What a table shows."""
    return [
        {
            "ratio": f"{c.ratio:g}",
            "achieved": f"{c.achieved_ratio:.2f}",
            "KV MB a request": f"{c.kv_bytes / 1e6:.2f}",
            "tokens before a difference": f"{c.shared:.0%}",
            "same answers": f"{c.same:.0%}",
            "log-probability difference": f"{c.log_prob_difference:.4f}",
            "first token, s": f"{c.first_token_seconds:.3f}",
            "next tokens, ms": f"{1000 * c.token_seconds:.1f}",
        }
        for c in comparisons
    ]
