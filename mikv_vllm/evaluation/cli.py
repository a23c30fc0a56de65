"""``mikv-eval``: what every byte of a KV cache buys."""

import argparse
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from mikv_vllm.evaluation.tasks import TASKS

DESCRIPTION = """\
Compare ways to store a KV cache on one model: divergence, agreement, recall, at true bytes.

All of them run in plain torch, in float32, on the same prompts; nothing but the method rounds.
Results go to --out: results.jsonl (a run that is cut off goes on), summary.csv, chart.png and .svg,
report.html and report.md.
"""

CALIBRATE_DESCRIPTION = """\
Find the low formats that buy the most for their bytes on a model, and write them to --out.

mikv-serve --kv-low-formats FILE lets ratios choose from them. The text is not that of `curve`.
"""
COMPARE_DESCRIPTION = """\
Send the same prompts to a running mikv-serve at several ratios and compare with ratio 1.

Ratio 1 among the ratios is asked twice: what differs there is not compression, but what shares a
step with what. Answers are greedy, one at a time, without the prefix cache.
"""


def positive(text: str) -> int:
    """How argparse reads a count."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="mikv-eval", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], None], text: str, description: str
    ) -> argparse.ArgumentParser:
        kind = argparse.RawDescriptionHelpFormatter
        added = commands.add_parser(name, help=text, description=description, formatter_class=kind)
        added.set_defaults(run=run)
        return added

    curve = command(
        "curve", run_curve, "quality against stored bytes, method by method", DESCRIPTION
    )
    curve.add_argument("--out", type=Path, default=Path("mikv-eval"), help="folder for results")
    curve.add_argument(
        "--tasks",
        nargs="+",
        default=list(TASKS),
        metavar="TASK",
        help=f"{', '.join(TASKS)}, or a file of JSON lines, {{'prompt': …, 'answer': …}}",
    )
    _add_windows(curve, 8, "prompts of each task")
    curve.add_argument(
        "--ratios", nargs="+", type=float, default=[2.0, 3.0, 3.2, 4.0, 5.0, 5.5], metavar="R"
    )
    curve.add_argument("--methods", nargs="+", metavar="NAME", help="families; all by default")
    curve.add_argument("--block-size", type=positive, default=32, help="tokens of a page")
    curve.add_argument(
        "--served",
        choices=("bfloat16", "float16"),
        help="measure what engines of this dtype serve too: ours, and stock vLLM's fp8 cache",
    )
    curve.add_argument(
        "--quick", action="store_true", help="2 short prompts of each task: a look in 3 minutes"
    )

    calibrate = command(
        "calibrate",
        run_calibrate,
        "the low formats for a model, from measurements",
        CALIBRATE_DESCRIPTION,
    )
    calibrate.add_argument("--out", type=Path, default=Path("low-formats.json"), metavar="FILE")
    _add_windows(calibrate, 4, "pieces of the text")

    compare = command(
        "compare", run_compare, "a running server's answers at several ratios", COMPARE_DESCRIPTION
    )
    compare.add_argument("--url", required=True, help="of mikv-serve, without /v1")
    compare.add_argument("--api-key", help="what the server was started with")
    compare.add_argument("--model", help="served model; the first by default")
    compare.add_argument(
        "--ratios", nargs="+", type=float, default=[1.0, 2.0, 3.0, 4.0, 5.0], metavar="R"
    )
    compare.add_argument("--prompts", type=Path, help='JSON lines, {"prompt": "…"}')
    compare.add_argument(
        "--count", type=positive, default=8, help="prompts of the Python reference"
    )
    compare.add_argument("--max-tokens", type=positive, default=64, help="of an answer")
    return top


def _add_windows(command: argparse.ArgumentParser, count: int, what: str) -> None:
    """What a model continues, and which model."""
    command.add_argument("--model", help="folder or name of a model; the embedded one by default")
    command.add_argument("--text", type=Path, help="a text file instead of the Python reference")
    command.add_argument("--windows", type=positive, default=count, help=what)
    command.add_argument("--prompt", type=positive, default=1536, help="tokens of a prompt")
    command.add_argument(
        "--continuation", type=positive, default=256, help="tokens that follow the text"
    )


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"mikv-eval: {error}", file=sys.stderr)
        return 2
    return 0


def run_curve(args: argparse.Namespace) -> None:
    """Measure, then write the report."""
    needs("matplotlib", "tqdm")
    import transformers
    from tqdm import tqdm

    from mikv_vllm.evaluation import lab, report
    from mikv_vllm.evaluation.methods import every_method
    from mikv_vllm.evaluation.reference_model import ReferenceModel
    from mikv_vllm.evaluation.tasks import windows_of
    from mikv_vllm.models import embedded_model
    from mikv_vllm.tiers.plan import largest_ratio

    if args.quick:
        args.windows, args.prompt, args.continuation = 2, 512, 64
    methods = every_method(args.ratios, args.block_size)
    families = list(dict.fromkeys(method.family for method in methods))
    if args.methods:
        if unknown := set(args.methods) - set(families):
            names = ", ".join(sorted(unknown))
            raise ValueError(f"--methods: there is no {names}; there are {', '.join(families)}")
        methods = [method for method in methods if method.family in args.methods]
    model_path = args.model or embedded_model()
    config = transformers.AutoConfig.from_pretrained(model_path)
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    most = largest_ratio(head_dim)
    if wrong := [ratio for ratio in args.ratios if not 1.0 < ratio <= most]:
        raise ValueError(f"--ratios: {wrong[0]:g} is not above 1 and at most {most:g}")
    model = ReferenceModel(model_path)
    served = None
    if args.served:
        from mikv_vllm.evaluation.served import Served

        served = Served(model_path, args.ratios, args.block_size, args.served)
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
    """Measure formats, print the ladder and write it."""
    needs("tqdm")
    from tqdm import tqdm

    from mikv_vllm.evaluation import calibration
    from mikv_vllm.evaluation.reference_model import ReferenceModel
    from mikv_vllm.evaluation.tables import markdown_table
    from mikv_vllm.evaluation.windows import calibration_text, cut_windows
    from mikv_vllm.models import embedded_model

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
    calibration.write(points, args.model or "SmolLM2-135M-Instruct", args.out)
    print(f"written: {args.out}")


def run_compare(args: argparse.Namespace) -> None:
    """Ask, then print a table."""
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


def needs(*packages: str) -> None:
    """Refuse to go on without packages of the extra ``eval``."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ValueError(f"needs {' and '.join(missing)}: pip install 'mikv-vllm[eval]'")


if __name__ == "__main__":
    sys.exit(main())
