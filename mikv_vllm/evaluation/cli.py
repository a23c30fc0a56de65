"""``mikv-eval``: measure the quality of a compressed KV cache."""

import argparse
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from mikv_vllm.evaluation.arguments import positive
from mikv_vllm.evaluation.served_tasks import command as served_tasks
from mikv_vllm.evaluation.tasks import TASKS

DESCRIPTION = """\
Compare methods that store a KV cache on one model: quality by stored bytes, metadata included.

All methods run in plain torch and float32 on the same prompts, so only the method changes the
predictions. --out receives results.jsonl, summary.csv, chart.png, chart.svg, report.html and
report.md. A run that was interrupted continues from results.jsonl.
"""

"""Description of ``mikv-eval curve``."""
CALIBRATE_DESCRIPTION = """\
Find the low formats with the least divergence for their bytes on a model, and write them to --out.

Serve with them: mikv-serve --kv-low-formats FILE. The text differs from that of `curve`.
"""
"""Description of ``mikv-eval calibrate``."""
COMPARE_DESCRIPTION = """\
Send the same prompts to a running mikv-serve at several ratios, and compare with ratio 1.

Ratio 1 in --ratios is sent a second time. Its differences do not come from compression, but from
rounding in different batches. Answers are greedy, one at a time, without the prefix cache.
"""
"""Description of ``mikv-eval compare``."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = argparse.ArgumentParser(prog="mikv-eval", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], None], text: str, description: str
    ) -> argparse.ArgumentParser:
        kind = argparse.RawDescriptionHelpFormatter
        added = commands.add_parser(name, help=text, description=description, formatter_class=kind)
        added.set_defaults(run=run)
        return added

    curve = command("curve", run_curve, "compare methods: quality by stored bytes", DESCRIPTION)
    curve.add_argument(
        "--out",
        type=Path,
        default=Path("mikv-eval"),
        help="folder for the results (default: %(default)s)",
    )
    curve.add_argument(
        "--tasks",
        nargs="+",
        default=list(TASKS),
        metavar="TASK",
        help=f'{", ".join(TASKS)}, or a file with lines {{"prompt": …, "answer": …}} '
        "(default: all)",
    )
    _add_windows(curve, 8, "prompts per task")
    curve.add_argument(
        "--ratios",
        nargs="+",
        type=float,
        default=[2.0, 3.0, 3.2, 4.0, 5.0, 5.5],
        metavar="R",
        help="compression ratios (default: 2 3 3.2 4 5 5.5)",
    )
    curve.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="names of methods, as in reports (default: all)",
    )
    curve.add_argument(
        "--block-size",
        nargs="+",
        type=positive,
        default=[32],
        metavar="TOKENS",
        help="tokens per page; --served uses the first number (default: 32)",
    )
    curve.add_argument(
        "--served",
        choices=("bfloat16", "float16"),
        help="also measure engines of this dtype: MiKV, and stock vLLM with its fp8 cache",
    )
    curve.add_argument(
        "--prompt-precision",
        choices=("highest", "medium"),
        default="highest",
        help="precision of the matrix products of the prompt: float32 (highest), or bfloat16 "
        "(medium), which is faster for long prompts (default: %(default)s)",
    )
    curve.add_argument(
        "--quick", action="store_true", help="2 short prompts per task, which takes about 3 minutes"
    )

    calibrate = command(
        "calibrate",
        run_calibrate,
        "find the low formats for a model",
        CALIBRATE_DESCRIPTION,
    )
    calibrate.add_argument(
        "--out",
        type=Path,
        default=Path("low-formats.json"),
        metavar="FILE",
        help="file to write (default: %(default)s)",
    )
    calibrate.add_argument("--name", help="name of the model in FILE (default: --model)")
    _add_windows(calibrate, 4, "prompts")

    compare = command(
        "compare",
        run_compare,
        "compare the answers of a running server at several ratios",
        COMPARE_DESCRIPTION,
    )
    compare.add_argument("--url", required=True, help="URL of mikv-serve, without /v1")
    compare.add_argument("--api-key", help="API key of the server")
    compare.add_argument("--model", help="name of the served model (default: the first one)")
    compare.add_argument(
        "--ratios",
        nargs="+",
        type=float,
        default=[1.0, 2.0, 3.0, 4.0, 5.0],
        metavar="R",
        help="compression ratios (default: 1 2 3 4 5)",
    )
    compare.add_argument(
        "--prompts",
        type=Path,
        help='file with lines {"prompt": "…"} (default: pieces of the Python reference)',
    )
    compare.add_argument(
        "--count",
        type=positive,
        default=8,
        help="pieces of the Python reference (default: %(default)s)",
    )
    compare.add_argument(
        "--max-tokens",
        type=positive,
        default=64,
        help="most tokens of an answer (default: %(default)s)",
    )

    served_tasks.add_arguments(
        command(
            "tasks",
            run_tasks,
            "ask a server questions at several ratios, and check the answers",
            served_tasks.DESCRIPTION,
        )
    )
    return top


def _add_windows(command: argparse.ArgumentParser, count: int, what: str) -> None:
    """Add the flags of the model and of its prompts."""
    command.add_argument("--model", help="folder or name of a model (default: the embedded one)")
    command.add_argument("--text", type=Path, help="text file (default: the Python reference)")
    command.add_argument(
        "--windows", type=positive, default=count, help=f"{what} (default: %(default)s)"
    )
    command.add_argument(
        "--prompt", type=positive, default=1536, help="tokens per prompt (default: %(default)s)"
    )
    command.add_argument(
        "--continuation",
        type=positive,
        default=256,
        help="tokens that are predicted after a prompt of text (default: %(default)s)",
    )


def main(argv: list[str] | None = None) -> int:
    """Run a command and return the exit status: 2 if the arguments are wrong."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"mikv-eval: {error}", file=sys.stderr)
        return 2
    return 0


def run_curve(args: argparse.Namespace) -> None:
    """Measure all methods, then write the report."""
    needs("matplotlib", "tqdm")
    import transformers
    from tqdm import tqdm

    from mikv_vllm.evaluation import lab, report
    from mikv_vllm.evaluation.methods import every_method
    from mikv_vllm.evaluation.reference_model import ReferenceModel
    from mikv_vllm.evaluation.tasks import windows_of
    from mikv_vllm.models import embedded_model
    from mikv_vllm.tiers.calibrations import ladder_of
    from mikv_vllm.tiers.plan import largest_ratio

    if args.quick:
        args.windows, args.prompt, args.continuation = 2, 512, 64
    model_path = args.model or embedded_model()
    config = transformers.AutoConfig.from_pretrained(model_path)
    ladder = ladder_of(config)
    methods = every_method(args.ratios, args.block_size, ladder)
    families = list(dict.fromkeys(method.family for method in methods))
    if args.methods:
        if unknown := set(args.methods) - set(families):
            names = ", ".join(sorted(unknown))
            raise ValueError(f"--methods: unknown names {names}; choose from {', '.join(families)}")
        methods = [method for method in methods if method.family in args.methods]
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    most = largest_ratio(head_dim, ladder=ladder)
    if wrong := [ratio for ratio in args.ratios if not 1.0 < ratio <= most]:
        raise ValueError(
            f"--ratios: {wrong[0]:g} is out of range; give ratios above 1, up to {most:g}"
        )
    model = ReferenceModel(model_path, prompt_precision=args.prompt_precision)
    served = None
    if args.served:
        from mikv_vllm.evaluation.served import Served

        served = Served(model_path, args.ratios, args.block_size[0], args.served)
    text = args.text.read_text() if args.text else None
    args.out.mkdir(parents=True, exist_ok=True)
    for task in args.tasks:
        windows = windows_of(
            task, model.tokenizer, args.windows, args.prompt, args.continuation, text
        )
        steps = lab.measure(model, task, windows, methods, args.out)
        for _ in tqdm(steps, desc=task, total=len(windows) * (len(methods) + 1), unit="run"):
            pass
        if served is not None:
            steps = lab.measure_served(served, task, windows, args.out)
            total = len(windows) * len(served.settings)
            for _ in tqdm(steps, desc=f"{task}, served", total=total, unit="run"):
                pass
    summaries = lab.summarize(lab.load(args.out))
    report.write_csv(summaries, args.out / "summary.csv")
    report.draw(summaries, [args.out / "chart.png", args.out / "chart.svg"])
    title = f"{args.model or 'SmolLM2-135M-Instruct'}: quality by byte"
    (args.out / "report.md").write_text(report.markdown(summaries) + "\n")
    report.write_html(summaries, args.out / "chart.png", title, args.out / "report.html")
    print(report.markdown(summaries))
    print(f"written: {args.out}/summary.csv, chart.png, chart.svg, report.md, report.html")


def run_calibrate(args: argparse.Namespace) -> None:
    """Measure low formats, then print and write the ladder."""
    needs("tqdm")
    from tqdm import tqdm

    from mikv_vllm.evaluation import calibration
    from mikv_vllm.evaluation.reference_model import ReferenceModel
    from mikv_vllm.evaluation.tables import markdown_table
    from mikv_vllm.evaluation.windows import calibration_text, cut_windows
    from mikv_vllm.models import embedded_model
    from mikv_vllm.tiers.formats import LowFormat

    model = ReferenceModel(args.model or embedded_model())
    text = args.text.read_text() if args.text else calibration_text()
    windows = cut_windows(model.tokenizer, args.windows, args.prompt, args.continuation, text)
    found = calibration.Calibration(model, windows, lambda them: tqdm(them, unit="window"))
    points = found.ladder()
    rows = [
        {"format": p.name, "ratio": f"{p.ratio:.2f}", "KL divergence": f"{p.divergence:.5f}"}
        for p in points
    ]
    print(markdown_table(rows))
    ladder = tuple(LowFormat.parse(point.name) for point in points)
    by_ratio = found.by_ratio(ladder)
    rows = [
        {
            "requested ratio": f"{p.ratio:g}",
            "achieved": f"{p.achieved:.2f}",
            "KL divergence": f"{p.divergence:.5f}",
        }
        for p in by_ratio
    ]
    print(markdown_table(rows))
    name = args.name or args.model or "SmolLM2-135M-Instruct"
    calibration.write(points, by_ratio, name, model.shape, args.out)
    print(f"written: {args.out}")


def run_compare(args: argparse.Namespace) -> None:
    """Send all prompts, then print a table."""
    needs("tqdm")
    from tqdm import tqdm

    from mikv_vllm.evaluation import compare
    from mikv_vllm.evaluation.tables import markdown_table

    prompts = compare.read_prompts(args.prompts, args.count)
    server = compare.Server(args.url, args.api_key, args.model, args.max_tokens)
    steps = compare.compare(server, prompts, args.ratios)
    answers = list(tqdm(steps, total=len(prompts) * len(args.ratios), unit="answer"))
    print(f"{server.model} at {args.url}, {len(prompts)} prompts\n")
    print(markdown_table(compare.rows(compare.summarize(answers))))


def run_tasks(args: argparse.Namespace) -> None:
    """Ask all questions, then write and print the report."""
    needs("tqdm")
    served_tasks.run(args)


def needs(*packages: str) -> None:
    """Raise ``ValueError`` if packages of the extra ``eval`` are not installed."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ValueError(f"{' and '.join(missing)} not installed: pip install 'mikv-vllm[eval]'")


if __name__ == "__main__":
    sys.exit(main())
