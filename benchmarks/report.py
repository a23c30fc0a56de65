"""Results of the benchmarks as Markdown tables and a chart."""

from pathlib import Path

from mikv_vllm.evaluation.tables import markdown_table

TITLES = {
    "first_token": "Time to the first token",
    "decode": "Decode",
    "concurrency": "Requests at once in the same pool",
    "sharing": "Requests that share a beginning",
    "quality": "Quality",
    "conversation": "Fourth turn of a conversation",
    "speculation": "Speculative decoding of text that repeats itself",
}
HEADINGS = {
    "of_stock": "relative to stock",
    "ms_per_step": "ms per step",
    "tokens_per_s": "tokens per s",
    "tokens_per_step": "tokens per step",
    "ms_per_token": "ms per token",
    "achieved_ratio": "achieved ratio",
    "first_token_s": "first token, s",
    "prompt": "prompt, tokens",
    "context": "context, tokens",
    "at_once": "requests at once",
    "peak_pages": "pages at the peak",
    "of_ratio_1": "relative to ratio 1",
    "divergence": "KL divergence, nats",
    "fourth_turn": "KL divergence of a fourth turn, nats",
    "of_fresh": "relative to a whole prompt",
    "pass_keys": "pass keys found",
    "divergence_error": "standard error",
    "agreement": "same likeliest token",
    "low_format": "low format",
}
"""Column headings by key of a result; other keys are their own heading."""


def tables(result: dict) -> str:
    """Return one Markdown table for each part of a result."""
    parts = [f"{result['date']}, {result['machine']}"]
    for name, rows in result.items():
        if isinstance(rows, list):
            shown = [{HEADINGS.get(key, key): value for key, value in row.items()} for row in rows]
            parts.append(f"## {TITLES[name]}\n\n{markdown_table(shown)}")
    return "\n\n".join(parts)


def plot(result: dict, path: Path) -> list[Path]:
    """Draw decode time against context, one panel per batch, and quality against ratio.

    Returns:
        The files that were written; none if the result has neither part.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result.get("decode", [])
    batches = sorted({row["sequences"] for row in rows})
    panels = len(batches) + ("quality" in result)
    if not panels:
        return []
    figure, axes = plt.subplots(1, panels, figsize=(5 * panels, 4), squeeze=False)
    for axis, batch in zip(axes[0], batches, strict=False):
        for name in dict.fromkeys(row["contender"] for row in rows):
            points = [
                (row["context"], row["ms_per_step"])
                for row in rows
                if row["sequences"] == batch and row["contender"] == name
            ]
            style = "--" if name.startswith("stock") else "-"
            axis.plot(*zip(*points, strict=True), style, marker="o", label=name)
        axis.set(title=f"{batch} sequences", xlabel="context, tokens", ylabel="ms per decode step")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    if "quality" in result:
        axis = axes[0][-1]
        for dtype in dict.fromkeys(row["dtype"] for row in result["quality"]):
            quality = [row for row in result["quality"] if row["dtype"] == dtype]
            axis.errorbar(
                [row["achieved_ratio"] for row in quality],
                [row["divergence"] for row in quality],
                [row["divergence_error"] for row in quality],
                marker="o",
                label=dtype,
            )
        axis.legend(fontsize=7)
        axis.set(title="quality", xlabel="achieved ratio", ylabel="KL divergence, nats")
        axis.set_yscale("log")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return [path]
