"""Results of questions: one line of ``results.jsonl`` for each question and ratio."""

import json
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from mikv_vllm.evaluation.served_tasks.question import Question, Reply, Verdict

FILE = "results.jsonl"


@dataclass(frozen=True)
class Result:
    """Answer to one question at one ratio."""

    model: str
    key: str
    """Identifier of the question."""
    task: str
    kind: str
    ratio: float
    """Requested ratio."""
    accuracy: float
    valid: bool | None
    text: str
    tool_calls: list
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    report: dict
    """Field ``kv_compression`` of the response."""
    seconds: float

    @classmethod
    def of(
        cls,
        model: str,
        key: str,
        question: Question,
        ratio: float,
        reply: Reply,
        verdict: Verdict,
        seconds: float,
    ) -> "Result":
        """Return the result of a reply."""
        return cls(
            model,
            key,
            question.task,
            question.kind,
            ratio,
            verdict.accuracy,
            verdict.valid,
            reply.text,
            [list(call) for call in reply.tool_calls],
            reply.finish_reason,
            reply.prompt_tokens,
            reply.completion_tokens,
            reply.cached_tokens,
            reply.report,
            round(seconds, 3),
        )


class Results:
    """The results of a folder.

    Args:
        folder: receives ``results.jsonl``. Results that it has already are kept.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._lock = threading.Lock()
        self._found: dict[tuple[str, str, float], Result] = {}
        text = self._path.read_text() if self._path.exists() else ""
        # An interrupted run can leave an incomplete last line.
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self._path.write_text(whole)
        for line in whole.splitlines():
            self._keep(Result(**json.loads(line)))

    def _keep(self, result: Result) -> None:
        self._found[result.model, result.key, result.ratio] = result

    def get(self, model: str, key: str, ratio: float) -> Result | None:
        """Return a result, or None if it is not there yet."""
        return self._found.get((model, key, ratio))

    def add(self, result: Result) -> None:
        """Append a result to the file."""
        with self._lock:
            with self._path.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
            self._keep(result)
