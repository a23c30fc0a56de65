"""Connection to a running ``mikv-serve``."""

from typing import Any

import openai
from openai.types import Model

from mikv_vllm.config import REPORT_FIELD


def connect(
    url: str, api_key: str | None, **options: Any
) -> tuple[openai.OpenAI, dict[str, Model]]:
    """Return a client of a server, and the models that it serves by name.

    Args:
        url: URL of the server, without ``/v1``.
        api_key: API key of the server, or None.
        options: more arguments of ``openai.OpenAI``.

    Raises:
        ValueError: the server cannot be reached.
    """
    client = openai.OpenAI(
        base_url=f"{url.rstrip('/')}/v1", api_key=api_key or "none", max_retries=0, **options
    )
    try:
        return client, {model.id: model for model in client.models.list().data}
    except openai.OpenAIError as error:
        raise ValueError(f"--url: the server at {url} does not answer: {error}") from None


def require_report(report: dict | None, url: str) -> dict:
    """Return the report of an answer.

    Raises:
        ValueError: there is none.
    """
    if report is None:
        raise ValueError(
            f"--url: the server at {url} does not report {REPORT_FIELD}; start it with mikv-serve"
        )
    return report
