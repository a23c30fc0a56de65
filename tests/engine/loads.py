"""Random loads for the simulation: conversations, branches, salts, aborts and small pools."""

from hypothesis import strategies as st

from mikv_vllm.config import CompressionConfig

from .simulation import Simulation, engine_config, make_scheduler, write_model_config

RECENT = 8
CONFIGS = {
    "window": CompressionConfig(min_tokens=128, recent=RECENT, native_share=1.0),
    "h2o": CompressionConfig(min_tokens=128, recent=RECENT, importance="h2o"),
    "two ranks": CompressionConfig(min_tokens=128, recent=RECENT, native_share=0.2),
}
ENGINE_ARGS = {"two ranks": {"tensor_parallel_size": 2}}


class Configs:
    """vLLM's configurations by name, in a class that hypothesis can print."""

    def __init__(self, folder) -> None:
        write_model_config(folder)
        self._by_name = {
            name: engine_config(folder, config, **ENGINE_ARGS.get(name, {}))
            for name, config in CONFIGS.items()
        }

    def __getitem__(self, name):
        return self._by_name[name]

    def __repr__(self) -> str:
        return "Configs"


REQUEST = st.fixed_dictionaries(
    {
        # Steps after the request before it.
        "after": st.integers(0, 60),
        # Which earlier request it goes on from, counted back; how many of its last tokens it drops,
        # perhaps beside the answer; and whether it has the same ratio, salt and adapter.
        "continues": st.sampled_from([0, 0, 1, 1, 2, 3]),
        "drop": st.sampled_from([0, 0, 1, RECENT, RECENT + 1, 20, 150]),
        "drops_answer": st.booleans(),
        "is_same": st.sampled_from([True, True, True, False]),
        "prefix": st.integers(0, 2),
        "prefix_tokens": st.sampled_from([0, 64, 200, 600]),
        "own_tokens": st.integers(1, 500),
        "more_if_compressed": st.sampled_from([0, 0, 700]),
        "max_tokens": st.integers(1, 100),
        "ratio": st.sampled_from([1.0, 1.5, 2.0, 3.3, 4.0, 5.0, 6.7]),
        "salt": st.sampled_from([None, None, None, "a"]),
        "adapter": st.sampled_from([None, None, None, 1]),
        "n": st.sampled_from([1, 1, 1, 3]),
        "abort_after": st.none() | st.integers(0, 60),
    }
)
REQUESTS = st.lists(REQUEST, min_size=1, max_size=10)
NUM_PAGES = st.integers(52, 120)
DEPTH = st.sampled_from([1, 2])
DRAFTS = st.integers(1, 9)


def inherit(requests: list[dict]) -> list[dict]:
    """The requests with arrival times, and with the options of those that they go on from."""
    arrival, complete = 0, []
    for i, request in enumerate(requests):
        arrival += request["after"]
        earlier = i - request["continues"]
        options = {"arrival": arrival, "earlier": earlier if 0 <= earlier < i else None}
        if options["earlier"] is not None and request["is_same"]:
            same = complete[earlier]
            options |= {key: same[key] for key in ("ratio", "salt", "adapter")}
        complete.append(request | options)
    return complete


def make_prompt(request: dict, index: int, history: list[int]) -> list[int]:
    """The prompt of a request, which goes on from the tokens of an earlier one."""
    most = 700 if request["ratio"] <= 3 else 1400  # it has to fit into the pool
    # Prefixes are shared by some requests and not by others.
    prefix = [request["prefix"]] * request["prefix_tokens"]
    more = request["more_if_compressed"] if request["ratio"] > 3 else 0
    prompt = prefix + [100 + index] * (request["own_tokens"] + more)
    return history[: most - 80] + prompt[-80:] if history else prompt[:most]


def run_load(
    vllm_configs: Configs,
    name: str,
    requests: list,
    num_pages: int,
    depth: int = 1,
    drafts: int = 0,
) -> None:
    """Run requests, and check every step and what is left in the end."""
    scheduler = make_scheduler(vllm_configs[name], CONFIGS[name], num_pages, depth > 1)
    simulation = Simulation(scheduler, depth, drafts)
    requests, lengths = inherit(requests), {}
    for now in range(requests[-1]["arrival"] + 61):
        for i, request in enumerate(requests):
            ids = [f"r{i}.{copy}" for copy in range(request["n"])]
            if request["arrival"] == now:
                # A later turn of a conversation, or a branch of it.
                earlier = f"r{request['earlier']}.0"
                history = simulation.tokens.get(earlier, [])
                kept = lengths.get(earlier) if request["drops_answer"] else len(history)
                history = history[: max(0, (kept or 0) - request["drop"])]
                prompt = make_prompt(request, i, history)
                lengths[ids[0]] = len(prompt)
                options = [request[key] for key in ("max_tokens", "ratio", "salt", "adapter")]
                for request_id in ids:
                    simulation.add(request_id, prompt, *options)
            if request["abort_after"] == now - request["arrival"]:
                simulation.abort(ids[0])
        if simulation.scheduler.has_requests():
            simulation.step()
    simulation.run()
    assert simulation.pool.get_num_free_blocks() == num_pages, "pages are held by nobody"
    context, manager, store = simulation.workers.context, scheduler.manager, scheduler.store
    left = (store.requests, store.ratios, manager.req_to_blocks, manager.hits)
    planner = scheduler.planner
    left += (store.branches, planner._scoring, planner.drafts._in_flight, planner.drafts._verified)
    left += (scheduler._with_stop_strings,)
    assert not any((*left, context.tiers, context.scores)), "an idle engine remembers requests"
