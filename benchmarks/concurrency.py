"""Number of requests that run at once without preemption in pools of the same size."""

from vllm import LLM, SamplingParams

from benchmarks.engines import BLOCK_SIZE, STOCK, Contender, engines
from benchmarks.pool import token_bytes
from benchmarks.prompts import distinct_prompts

POOL_TOKENS = 8 * 2048
"""Uncompressed tokens that fit into the pool: eight requests of 2,048."""
NEW_TOKENS = 160
RATIO_FOUR = Contender("ratio 4", "mikv", 4.0)


def _run(llm: LLM, contender: Contender, count: int) -> tuple[int, int]:
    """Run ``count`` requests that arrive together.

    Returns:
        Largest number of requests that decoded at the same time, and number of preemptions.
    """
    prompts = distinct_prompts(llm.get_tokenizer(), count, 2048 - NEW_TOKENS)
    engine = llm.llm_engine
    params = SamplingParams(
        temperature=0.0,
        max_tokens=NEW_TOKENS,
        ignore_eos=True,
        extra_args=contender.extra_args,
    )
    llm.reset_prefix_cache()
    for i, prompt in enumerate(prompts):
        name = f"{contender.name}-{count}-{i}"
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    before = _preemptions(llm)
    started: set[str] = set()
    finished: set[str] = set()
    most = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            started.add(output.request_id)
            if output.finished:
                finished.add(output.request_id)
        most = max(most, len(started - finished))
    return most, _preemptions(llm) - before


def _preemptions(llm: LLM) -> int:
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


def measure() -> list[dict]:
    """Increase the number of requests until one is preempted or has to wait.

    Returns:
        A row for stock vLLM and one for ratio 4.
    """
    rows: list[dict] = []
    names = {STOCK.engine, RATIO_FOUR.engine}
    settings = {"disable_log_stats": False, "max_num_seqs": 128}
    # One page more, because vLLM reserves the null page.
    pool_bytes = (POOL_TOKENS + BLOCK_SIZE) * token_bytes()
    with engines(names, pool_bytes, **settings) as llms:
        for contender, first in ((STOCK, 7), (RATIO_FOUR, 25)):
            best = 0
            for count in range(first, 64):
                most, preemptions = _run(llms[contender.engine], contender, count)
                print(f"{contender.name}: {count} sent, {most} at once, {preemptions} preempted")
                if most < count or preemptions:
                    break
                best = count
            rows.append({"contender": contender.name, "at_once": best})
        for row in rows:
            row["of_stock"] = round(row["at_once"] / rows[0]["at_once"], 2)
    return rows
