"""Requests to a running ``mikv-serve``."""

from typing import Any

import httpx
import openai

from mikv_vllm.config import RATIO_FIELD, REPORT_FIELD
from mikv_vllm.evaluation.connection import connect, require_report
from mikv_vllm.evaluation.served_tasks.question import Question, Reply, ToolCall

REQUEST_SECONDS = 3600
"""Longest time of a request, which can wait for others on a slow machine."""


class Client:
    """A client of the chat route. Answers are greedy.

    Args:
        url: URL of the server, without ``/v1``.
        api_key: API key of the server, or None.
        model: name of the served model; None for the first one.

    Raises:
        ValueError: the server cannot be reached.
    """

    def __init__(self, url: str, api_key: str | None, model: str | None) -> None:
        self._url = url.rstrip("/")
        self._api_key = api_key or "none"
        self._client, served = connect(url, api_key, timeout=REQUEST_SECONDS)
        self.model = model or next(iter(served))
        if self.model not in served:
            names = ", ".join(served)
            raise ValueError(f"--served-model-name: {model} is not served; choose from {names}")
        self.max_model_len: int = (served[self.model].model_extra or {})["max_model_len"]
        """Most tokens of a request."""

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text."""
        response = httpx.post(
            f"{self._url}/tokenize",
            json={"model": self.model, "prompt": text},
            headers={"Authorization": f"Bearer {self._api_key}"},
            timeout=REQUEST_SECONDS,
        )
        return response.raise_for_status().json()["count"]

    def ask(
        self, messages: list[dict[str, Any]], question: Question, ratio: float, salt: str
    ) -> Reply:
        """Send a conversation that ends with a question.

        Args:
            messages: the conversation.
            question: its tools, the form of its answer, and the length of its answer.
            ratio: compression ratio of the request.
            salt: ``cache_salt``; requests with different ones share no prefix.

        Raises:
            ValueError: the server refuses the request, or does not report ``kv_compression``.
        """
        fields: dict[str, Any] = {"tools": list(question.tools)} if question.tools else {}
        if question.response_format:
            fields["response_format"] = question.response_format
        try:
            answer = self._client.chat.completions.create(
                model=self.model,
                messages=messages,  # type: ignore[arg-type]
                max_tokens=question.max_tokens,
                temperature=0,
                extra_body={RATIO_FIELD: ratio, "cache_salt": salt},
                **fields,
            )
        except openai.OpenAIError as error:
            raise ValueError(f"{self._url}, {question.task}, ratio {ratio:g}: {error}") from None
        report = require_report((answer.model_extra or {}).get(REPORT_FIELD), self._url)
        choice, usage = answer.choices[0], answer.usage
        assert usage is not None, "an answer that is not a stream has usage"
        calls, details = choice.message.tool_calls or [], usage.prompt_tokens_details
        return Reply(
            text=choice.message.content or "",
            tool_calls=tuple(
                ToolCall(call.function.name, call.function.arguments)
                for call in calls
                if call.type == "function"
            ),
            finish_reason=choice.finish_reason,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=(details and details.cached_tokens) or 0,
            report=report,
        )
