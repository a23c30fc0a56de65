"""Tool calls: questions and answers of the Berkeley Function Calling Leaderboard.

The data is that of the package ``bfcl-eval``. Functions of other questions are offered beside those
of a question, so that the prompt is as long as that of an agent.
"""

import json
import random
import re
from collections.abc import Callable
from typing import Any

from mikv_vllm.evaluation.served_tasks.json_text import JsonError, find_json, follows_schema
from mikv_vllm.evaluation.served_tasks.package_data import read_package_lines
from mikv_vllm.evaluation.served_tasks.question import (
    Question,
    Reply,
    Session,
    Sizes,
    ToolCall,
    Verdict,
)

TASK = "tool-calls"
PACKAGE = "bfcl-eval==2026.3.23"
FILES = {"simple": "BFCL_v4_simple_python.json", "multiple": "BFCL_v4_multiple.json"}
OFFERED = 8
"""Functions that a question offers."""
TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": None}
"""Types of JSON Schema for those of the data that it does not have."""


def make(sizes: Sizes) -> list[Session]:
    """Return a session for each question, in random order; kinds take turns.

    Raises:
        ValueError: the package ``bfcl-eval`` is not installed.
    """
    lines = {kind: _read(f"data/{file}") for kind, file in FILES.items()}
    allowed = {
        answer["id"]: answer["ground_truth"]
        for file in FILES.values()
        for answer in _read(f"data/possible_answer/{file}")
    }
    order = {kind: sizes.order(f"{TASK} {kind}", len(of_kind)) for kind, of_kind in lines.items()}
    most = len(FILES) * min(map(len, lines.values()))
    sessions = []
    for index, rng in sizes.draws(TASK, min(sizes.count, most)):
        kind = list(FILES)[index % len(FILES)]
        line = lines[kind][order[kind][index // len(FILES)]]
        tools = offered(line["function"], lines[kind], rng)
        (turn,) = line["question"]
        question = Question(
            TASK,
            kind,
            turn[-1]["content"],
            calls(allowed[line["id"]], tools),
            max_tokens=256,
            tools=tuple(tools),
        )
        sessions.append(Session((question,)))
    return sessions


def _read(path: str) -> list[dict[str, Any]]:
    return read_package_lines(f"--tasks {TASK}", PACKAGE, "bfcl_eval", path)


def offered(
    functions: list[dict[str, Any]], lines: list[dict[str, Any]], rng: random.Random
) -> list[dict[str, Any]]:
    """Return the tools of a request: the functions of a question and some of other questions."""
    chosen = {function["name"]: function for function in functions}
    while len(chosen) < max(OFFERED, len(functions)):
        for function in rng.choice(lines)["function"]:
            chosen.setdefault(function["name"], function)
    tools = [tool(function) for function in chosen.values()]
    rng.shuffle(tools)
    return tools


def tool(function: dict[str, Any]) -> dict[str, Any]:
    """Return a function of the data as a tool of the chat API."""
    return {
        "type": "function",
        "function": {
            "name": tool_name(function["name"]),
            "description": function["description"],
            "parameters": _schema(function["parameters"]),
        },
    }


def tool_name(name: str) -> str:
    """Return the name of a function without dots, which the chat API does not allow."""
    return name.replace(".", "_")


def _schema(value: Any) -> Any:
    """Return a parameter description as JSON Schema."""
    if isinstance(value, list):
        return [_schema(one) for one in value]
    if not isinstance(value, dict):
        return value
    found = {}
    for name, one in value.items():
        if name == "type" and isinstance(one, str):
            if (kind := TYPES.get(one, one)) is not None:
                found[name] = kind
        else:
            found[name] = _schema(one)
    return found


def calls(allowed: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Callable[[Reply], Verdict]:
    """Return a check that an answer is one call with allowed arguments.

    An answer is valid if it is one call of an offered tool, and its arguments follow the schema.

    Args:
        allowed: one object, with the name of the function and for each parameter the allowed
            values. An empty string among them means that the parameter may be missing.
        tools: the tools of the request.
    """
    ((name, parameters),) = allowed[0].items()
    schemas = {one["function"]["name"]: one["function"]["parameters"] for one in tools}

    def check(reply: Reply) -> Verdict:
        try:
            (call,) = reply.tool_calls or calls_in_text(reply.text)
            arguments = json.loads(call.arguments)
        except ValueError:
            return Verdict(0.0, valid=False)
        if call.name not in schemas or not follows_schema(arguments, schemas[call.name]):
            return Verdict(0.0, valid=False)
        right = call.name == tool_name(name) and are_allowed(arguments, parameters)
        return Verdict(float(right), valid=True)

    return check


def calls_in_text(text: str) -> list[ToolCall]:
    """Return the call that a text contains as JSON.

    Some models write a call without the marks that the server's tool parser looks for.

    Raises:
        ValueError: the text contains no call.
    """
    found = find_json(text)
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        raise JsonError("no call")
    return [ToolCall(found["name"], json.dumps(found.get("arguments")))]


def are_allowed(arguments: dict[str, Any], parameters: dict[str, list]) -> bool:
    """Whether every argument has an allowed value, and only arguments that may be are missing."""
    if any(name not in parameters for name in arguments):
        return False
    return all(
        any(is_same(arguments[name], value) for value in values)
        if name in arguments
        else "" in values
        for name, values in parameters.items()
    )


def is_same(value: Any, allowed: Any) -> bool:
    """Whether a value is the allowed one. Texts are compared by their letters and digits."""
    if isinstance(allowed, dict):
        return isinstance(value, dict) and are_allowed(value, allowed)
    if isinstance(allowed, list):
        return (
            isinstance(value, list)
            and len(value) == len(allowed)
            and all(map(is_same, value, allowed))
        )
    if isinstance(allowed, str) and isinstance(value, str):
        return _letters(value) == _letters(allowed)
    if isinstance(allowed, bool) or isinstance(value, bool):
        return value is allowed
    return value == allowed


def _letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text).casefold()
