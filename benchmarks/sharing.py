"""Peak pages of requests that share a beginning, at ratio 1 and compressed."""

from vllm import LLM, SamplingParams

from benchmarks.engines import BLOCK_SIZE, RATIOS, Contender, engines
from benchmarks.pool import token_bytes
from benchmarks.prompts import distinct_prompts
from mikv_vllm.config import REPORT_FIELD

PREFIX_TOKENS = 2048
OWN_TOKENS = 96
"""Tokens of a prompt behind the prefix."""
NEW_TOKENS = 96
POOL_TOKENS = 16 * 4096
LOADS = {"16 requests": (16, 1), "2 requests with n = 8": (2, 8)}
"""Requests, and answers of each one."""
COMPARED = [contender for contender in RATIOS if contender.ratio in (1.0, 4.0)]


def measure() -> list[dict]:
    """Run each load at each ratio, with the prefix in the prefix cache.

    Returns:
        A row for each load and ratio.
    """
    rows: list[dict] = []
    settings = {"disable_log_stats": False, "max_num_seqs": 16}
    with engines({"mikv"}, POOL_TOKENS * token_bytes(), **settings) as llms:
        llm = llms["mikv"]
        prefix, *own = distinct_prompts(llm.get_tokenizer(), 17, PREFIX_TOKENS)
        for title, (count, answers) in LOADS.items():
            pages: dict[str, int] = {}
            for contender in COMPARED:
                llm.reset_prefix_cache()
                prompts = [[*prefix, *tokens[:OWN_TOKENS]] for tokens in own[:count]]
                run(llm, contender, [[*prefix, *own[-1][:OWN_TOKENS]]], 1)
                pages[contender.name], ratios = run(llm, contender, prompts, answers)
                rows.append(
                    {
                        "load": title,
                        "contender": contender.name,
                        "peak_pages": pages[contender.name],
                        "of_ratio_1": round(pages[contender.name] / pages[COMPARED[0].name], 2),
                        "achieved_ratio": f"{min(ratios):.2f} to {max(ratios):.2f}",
                    }
                )
                print(rows[-1], flush=True)
    return rows


def run(
    llm: LLM, contender: Contender, prompts: list[list[int]], answers: int
) -> tuple[int, list[float]]:
    """Run requests that arrive together.

    Returns:
        Most pages in use at once, and the achieved ratio of each request.
    """
    engine = llm.llm_engine
    params = SamplingParams(
        n=answers,
        temperature=1.0,
        seed=0,
        max_tokens=NEW_TOKENS,
        ignore_eos=True,
        extra_args=contender.extra_args,
    )
    for i, prompt in enumerate(prompts):
        engine.add_request(f"{contender.name}-{i}", {"prompt_token_ids": prompt}, params)
    most, ratios = 0.0, []
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                # One report for all answers of a request.
                ratios.append(output.kv_transfer_params[REPORT_FIELD]["achieved_ratio"])
        (usage,) = (m.value for m in llm.get_metrics() if m.name == "vllm:kv_cache_usage_perc")
        most = max(most, usage)
    return round(most * (POOL_TOKENS // BLOCK_SIZE - 1)), ratios
