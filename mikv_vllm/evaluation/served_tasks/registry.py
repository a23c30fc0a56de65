"""All tasks by name."""

from collections.abc import Callable

from mikv_vllm.evaluation.served_tasks import (
    code,
    documents,
    instructions,
    json_values,
    long_answers,
    needles,
    tool_calls,
)
from mikv_vllm.evaluation.served_tasks.question import Session, Sizes

TASKS: dict[str, Callable[[Sizes], list[Session]]] = {
    module.TASK: module.make
    for module in (needles, documents, tool_calls, json_values, instructions, code, long_answers)
}
"""For each task the function that makes its sessions."""
