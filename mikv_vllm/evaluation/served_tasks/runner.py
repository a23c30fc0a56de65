"""Asks all questions at all ratios."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from uuid import uuid4

from mikv_vllm.evaluation.served_tasks.client import Client
from mikv_vllm.evaluation.served_tasks.question import Question, Session
from mikv_vllm.evaluation.served_tasks.results import Result, Results


class Runner:
    """Asks sessions, several at once, and stores their results.

    A prompt without an opening is computed once, at ratio 1. The other ratios follow in descending
    order: they find the uncompressed pages of the prompt in the prefix cache, compute its last
    queries, and compress it, because they cannot use blocks of a larger ratio. A session with an
    opening shares nothing between ratios, because its questions have to find compressed blocks.

    Args:
        client: the server.
        results: receives the results, and has those of earlier runs.
        ratios: compression ratios.
        at_once: sessions at once.
    """

    def __init__(self, client: Client, results: Results, ratios: list[float], at_once: int) -> None:
        self._client, self._results, self._at_once = client, results, at_once
        self._stop = threading.Event()
        """Set at the end of a run, or after an error: then no request is sent any more."""
        self._ratios = sorted(ratios, key=lambda ratio: (ratio > 1.0, -ratio))

    def count(self, sessions: list[Session]) -> int:
        """Return the number of answers that are still missing."""
        return sum(
            len(self._missing(session, ratio)) for session in sessions for ratio in self._ratios
        )

    def run(self, sessions: list[Session], done: Callable[[Result], None]) -> None:
        """Ask what is missing.

        Args:
            sessions: questions.
            done: called with each new result after it is stored, in any thread.

        Raises:
            ValueError: the server refuses a request.
        """
        with ThreadPoolExecutor(self._at_once) as pool:
            runs = [pool.submit(self._ask_session, session, done) for session in sessions]
            try:
                for run in as_completed(runs):
                    run.result()
            finally:
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def _missing(self, session: Session, ratio: float) -> list[tuple[str, Question]]:
        """Return the questions of a session without a result, with their keys."""
        return [
            (key, question)
            for key, question in zip(session.identifiers(), session.questions, strict=True)
            if self._results.get(self._client.model, key, ratio) is None
        ]

    def _ask_session(self, session: Session, done: Callable[[Result], None]) -> None:
        """Ask the missing questions of a session at all ratios."""
        salt = uuid4().hex
        for ratio in self._ratios:
            missing = self._missing(session, ratio)
            if not missing or self._stop.is_set():
                continue
            if session.opening:
                salt = uuid4().hex
            history = self._open(session, ratio, salt) if session.opening else []
            for key, question in missing:
                if self._stop.is_set():
                    return
                done(self._ask(key, question, history, ratio, salt))

    def _open(self, session: Session, ratio: float, salt: str) -> list[dict]:
        """Send the opening, and return the conversation so far."""
        history = [{"role": "user", "content": session.opening}]
        turn = replace(
            session.questions[0], max_tokens=session.opening_max_tokens, response_format=None
        )
        reply = self._client.ask(history, turn, ratio, salt)
        return [*history, {"role": "assistant", "content": reply.text}]

    def _ask(
        self, key: str, question: Question, history: list[dict], ratio: float, salt: str
    ) -> Result:
        messages = [*history, {"role": "user", "content": question.content}]
        begin = time.perf_counter()
        reply = self._client.ask(messages, question, ratio, salt)
        seconds = time.perf_counter() - begin
        verdict = question.check(reply)
        result = Result.of(self._client.model, key, question, ratio, reply, verdict, seconds)
        self._results.add(result)
        return result
