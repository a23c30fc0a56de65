"""Comparison of a running server's answers to the same prompts at several ratios.

Answers are greedy. After the first token that differs, two answers continue different texts.
Therefore probabilities are only compared before that token.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from uuid import uuid4

import openai

from mikv_vllm.config import RATIO_FIELD, REPORT_FIELD
from mikv_vllm.evaluation.connection import connect, require_report
from mikv_vllm.evaluation.json_lines import read_texts
from mikv_vllm.evaluation.windows import topics_text

PROMPT_CHARACTERS = 6000
"""Length of a prompt that is cut from the Python reference."""


@dataclass(frozen=True)
class Answer:
    """An answer of a server."""

    tokens: list[str]
    log_probs: list[float]
    """Of each token, nats."""
    first_token_seconds: float
    seconds: float
    report: dict
    """Field ``kv_compression`` of the response."""

    @property
    def token_seconds(self) -> float:
        """Time per token after the first one."""
        return (self.seconds - self.first_token_seconds) / max(1, len(self.tokens) - 1)


@dataclass(frozen=True)
class Comparison:
    """Result of one ratio compared with ratio 1: means over prompts."""

    ratio: float
    achieved_ratio: float
    kv_bytes: float
    """Bytes of the cache of a request."""
    shared: float
    """Share of the tokens of an answer before the first one that differs."""
    same: float
    """Share of answers that are identical."""
    log_prob_difference: float
    """Mean absolute difference of the log-probabilities of shared tokens, nats."""
    first_token_seconds: float
    token_seconds: float


def read_prompts(path: Path | None, count: int) -> list[str]:
    """Return the prompts to send.

    Args:
        path: file with lines ``{"prompt": …}``; None for pieces of the Python reference.
        count: number of pieces.

    Raises:
        ValueError: a line has another form, or the file is empty.
    """
    if path is None:
        text = topics_text()
        stride = (len(text) - PROMPT_CHARACTERS) // count
        return [text[i * stride :][:PROMPT_CHARACTERS] for i in range(count)]
    return [prompt for (prompt,) in read_texts(path, ("prompt",), "--prompts")]


class Server:
    """A running ``mikv-serve``.

    Args:
        url: URL without ``/v1``.
        api_key: API key of the server, or None.
        model: name of the served model; None for the first one.
        max_tokens: most tokens of an answer.

    Raises:
        ValueError: the server cannot be reached, or refuses the request.
    """

    def __init__(self, url: str, api_key: str | None, model: str | None, max_tokens: int) -> None:
        self._url, self._max_tokens = url, max_tokens
        self._client, served = connect(url, api_key)
        self.model = model or next(iter(served))

    def ask(self, prompt: str, ratio: float) -> Answer:
        """Return the answer at a ratio.

        A ``cache_salt`` disables the prefix cache, which would make all answers but the first one
        faster.

        Raises:
            ValueError: the server refuses the request, or does not report ``kv_compression``.
        """
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
        end = time.perf_counter()
        times = (first or end) - begin, end - begin
        return Answer(tokens, log_probs, *times, require_report(report, self._url))


def compare(
    server: Server, prompts: list[str], ratios: list[float]
) -> Iterator[tuple[float, Answer, Answer]]:
    """Send all prompts at all ratios.

    Ratios take turns on each prompt, so that other load on the machine affects all of them equally.

    Yields:
        The ratio, the answer at this ratio, and the answer at ratio 1 to the same prompt.
    """
    for prompt in prompts:
        reference = server.ask(prompt, 1.0)
        for ratio in ratios:
            yield ratio, server.ask(prompt, ratio), reference


def summarize(answers: list[tuple[float, Answer, Answer]]) -> list[Comparison]:
    """Return the means over prompts, by ratio."""
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
    """Return the number of tokens before the first one that differs."""
    pairs = zip(mine.tokens, theirs.tokens, strict=False)
    different = (i for i, (a, b) in enumerate(pairs) if a != b)
    return next(different, min(len(mine.tokens), len(theirs.tokens)))


def rows(comparisons: list[Comparison]) -> list[dict]:
    """Return the rows of a table."""
    return [
        {
            "ratio": f"{c.ratio:g}",
            "achieved": f"{c.achieved_ratio:.2f}",
            "KV cache per request, MB": f"{c.kv_bytes / 1e6:.2f}",
            "tokens before the first difference": f"{c.shared:.0%}",
            "identical answers": f"{c.same:.0%}",
            "log-probability difference": f"{c.log_prob_difference:.4f}",
            "first token, s": f"{c.first_token_seconds:.3f}",
            "time per next token, ms": f"{1000 * c.token_seconds:.1f}",
        }
        for c in comparisons
    ]
