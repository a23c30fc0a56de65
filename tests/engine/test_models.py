"""Every row of ``docs/models.md``: a small model of its kind is served well, or refused."""

import math
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from mikv_vllm.server import refusals
from mikv_vllm.server.refusals import Refusal

from . import kinds
from .conftest import BLOCK_SIZE
from .generated import SHAPE
from .kinds import NEW_TOKENS, REQUESTS, SERVED, UNSERVABLE

DOCUMENT = Path(__file__).parent.parent.parent / "docs/models.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in DOCUMENT.read_text().splitlines()
    if re.search(r"\| (served|refused) \|", line)
]

MLA = {"kv_lora_rank": 64, "q_lora_rank": 64, "qk_nope_head_dim": 64, "v_head_dim": 64}
WHISPER = {"d_model": 256, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
LAYERS = {"layer_types": [*3 * ["full_attention"], "sliding_attention"]}
REFUSED = {
    "a sliding window in every layer": ("Mistral", {"sliding_window": 128}),
    "far more full-attention layers than others": ("Cohere2", LAYERS),
    "layers that share a KV cache": (
        "Gemma3nText",
        {
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": 6 * [0.0],
        },
    ),
    "ALiBi": ("Bloom", {"n_head": 4}),
    "multi-head latent attention (MLA)": ("DeepseekV2", {**MLA, "qk_rope_head_dim": 32}),
    "state-space layers alone": ("Mamba", {}),
    "state-space layers beside attention": ("Jamba", {}),
    "linear attention beside full attention": ("Qwen3Next", {}),
    "encoder-decoder models": ("Whisper", WHISPER),
    "pooling models": ("Bert", {}),
    "head size 32": ("Llama", {"head_dim": 32}),
    "head size 192": ("Llama", {"head_dim": 192}),
    "full-attention layers of head size 512": (
        "Gemma4Text",
        {"head_dim": 256, "global_head_dim": 512, "num_kv_shared_layers": 0},
    ),
}
"""Class of the configuration in transformers, and what is particular about it."""
ARCHITECTURES = {
    "Gemma3nText": "Gemma3nForCausalLM",
    "Gemma4Text": "Gemma4ForCausalLM",
    "Whisper": "WhisperForConditionalGeneration",
    "Bert": "BertModel",
}


@pytest.mark.parametrize(("word", "cases"), [("served", SERVED), ("refused", REFUSED)])
def test_every_row_has_a_case(word, cases):
    assert [row[0] for row in ROWS if row[1] == word] == list(cases)


def test_the_named_architectures_and_tests_exist():
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    tests = DOCUMENT.parent.parent / "tests"
    sources = "".join(path.read_text() for path in tests.rglob("test_*.py"))
    for row in ROWS:
        for name in re.findall(r"`(\w+)`", row[2]):
            assert name in known, name
        for name in re.findall(r"`(test_\w+)`", row[3]):
            assert f"def {name}(" in sources, name


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_in_the_sentence_of_the_table(kind, tmp_path):
    import transformers
    from vllm.engine.arg_utils import EngineArgs

    name, particular = REFUSED[kind]
    config = getattr(transformers, f"{name}Config")(**SHAPE | particular)
    config.architectures = [ARCHITECTURES.get(name, f"{name}ForCausalLM")]
    config.save_pretrained(tmp_path)
    arguments = EngineArgs(str(tmp_path), skip_tokenizer_init=True, dtype="bfloat16")
    with pytest.raises(Refusal) as refusal:
        refusals.check(arguments.create_engine_config())
    (reason,) = (re.search(r"\*(.+)\*", row[3])[1] for row in ROWS if row[0] == kind)
    assert str(refusal.value) == (
        f"--model {tmp_path} is not supported by MiKV ({reason}); serve it with `vllm serve`."
    )


@pytest.fixture(scope="module")
def process():
    """A process that holds one engine after the other."""
    with ProcessPoolExecutor(1, get_context("spawn"), kinds.prepare) as pool:
        yield pool


QUICK = (
    "grouped-query attention",
    "attention sinks",
    "five of six layers with a sliding window",
    "LoRA adapters",
    "images",
)
"""Kinds that differ most; the others are marked as slow."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in SERVED],
)
def measured(request, process, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return process.submit(kinds.measure, request.param, folder).result(timeout=300)


@pytest.mark.engine
def test_ratio_one_is_stock_vllm(measured):
    assert measured["native"] == measured["stock"]
    if SERVED[measured["kind"]].extra_matters:
        first, second = measured["native"][::2], measured["native"][1::2]
        assert all(one != other for one, other in zip(first, second, strict=True))


@pytest.mark.engine
def test_the_requested_ratio_is_achieved(measured):
    prompts, reports = measured["prompts"], measured["reports"]
    for (requested, _), length, report in zip(REQUESTS, prompts, reports, strict=True):
        print(report)
        assert report["requested_ratio"] == requested
        assert report["kv_tokens"] == length + NEW_TOKENS - 1
        # A tail has two partly filled pages more than its ratio asks for.
        native = report["kv_tokens"] / BLOCK_SIZE
        assert native / report["achieved_ratio"] <= native / requested + 2
        assert report["achieved_ratio"] <= 1.1 * requested


@pytest.mark.engine
def test_divergence_is_far_below_that_of_a_broken_cache(measured):
    divergence, broken = measured["divergence"], measured["broken"]
    print(f"ratio {kinds.RATIO}: {divergence:.2e}; broken: {broken:.2e}")
    assert math.isfinite(divergence)
    assert 0 < divergence < broken / 5
    if SERVED[measured["kind"]].without is not None:
        print(f"kernels that ignore the feature: {measured['without']:.2e}")
        assert measured["without"] > 3 * divergence


@pytest.mark.engine
def test_a_cached_prefix_changes_nothing(measured):
    for length, cached in zip(measured["prompts"], measured["cached"], strict=True):
        assert length - 96 <= cached < length
    # Another split of the prompt rounds differently: up to 8 % where AMX computes the products.
    assert measured["with_prefix"] == pytest.approx(measured["divergence"], rel=0.2)


@pytest.mark.engine
def test_all_pages_are_free_in_the_end(measured):
    assert measured["held_pages"] == measured["held_requests"] == 0


@pytest.mark.engine
@pytest.mark.parametrize("kind", UNSERVABLE)
def test_the_scheduler_refuses_in_one_sentence(process, kind, tmp_path):
    said = process.submit(kinds.refusal_at_start, kind, tmp_path).result(timeout=300)
    assert re.fullmatch(r"--model \S+ is not supported by MiKV \([^.]+\); [^.]+\.", said), said
