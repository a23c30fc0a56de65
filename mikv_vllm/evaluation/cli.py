"""``mikv-eval``: what every byte of a KV cache buys."""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from mikv_vllm.evaluation.tasks import TASKS

DESCRIPTION = """\
Compare ways to store a KV cache on one model: divergence, agreement, recall, at true bytes.

All of them run in plain torch, in float32, on the same prompts; nothing but the method rounds.
Results go to --out: results.jsonl (a run that is cut off goes on), summary.csv, chart.png and .svg,
report.html and report.md.
"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="mikv-eval", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    curve = commands.add_parser(
        "curve",
        help="quality against stored bytes, method by method",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    curve.add_argument("--model", help="folder or name of a model; the embedded one by default")
    curve.add_argument("--out", type=Path, default=Path("mikv-eval"), help="folder for results")
    curve.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    curve.add_argument("--text", type=Path, help="a text file instead of the Python reference")
    curve.add_argument("--windows", type=int, default=8, help="prompts of each task")
    curve.add_argument("--prompt", type=int, default=1536, help="tokens of a prompt")
    curve.add_argument("--continuation", type=int, default=256, help="tokens that follow the text")
    curve.add_argument(
        "--ratios", nargs="+", type=float, default=[2.0, 3.0, 4.0, 5.0, 5.5], metavar="R"
    )
    curve.add_argument("--methods", nargs="+", metavar="NAME", help="families; all by default")
    curve.add_argument("--block-size", type=int, default=32, help="tokens of a page")
    curve.add_argument(
        "--served",
        choices=("bfloat16", "float16"),
        help="measure what engines of this dtype serve too: ours, and stock vLLM's fp8 cache",
    )
    curve.add_argument(
        "--quick", action="store_true", help="2 short prompts of each task: a look in 3 minutes"
    )
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        curve(args)
    except ValueError as error:
        print(f"mikv-eval: {error}", file=sys.stderr)
        return 2
    return 0


def curve(args: argparse.Namespace) -> None:
    """Measure, then write the report."""
    if missing := [name for name in ("matplotlib", "tqdm") if find_spec(name) is None]:
        raise ValueError(f"needs {' and '.join(missing)}: pip install 'mikv-vllm[eval]'")
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


if __name__ == "__main__":
    sys.exit(main())
