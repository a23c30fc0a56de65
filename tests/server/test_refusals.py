"""What MiKV refuses before an engine starts."""

from types import SimpleNamespace

import pytest

from mikv_vllm.server import refusals
from mikv_vllm.server.cli import main, parse
from mikv_vllm.server.refusals import Refusal


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ('--kv-transfer-config {"kv_connector":"X","kv_role":"kv_both"}', "--kv-transfer-config"),
        ("--kv-offloading-size 4", "--kv-offloading-size"),
        ("--kv-cache-dtype fp8", "--kv-cache-dtype fp8"),
        ("--decode-context-parallel-size 2", "--decode-context-parallel-size 2"),
        ("--prefill-context-parallel-size 2", "--prefill-context-parallel-size 2"),
        ("--runner pooling", "--runner pooling"),
        ("--convert embed", "--convert embed"),
        ("--scheduler-cls a.B", "--scheduler-cls a.B is not allowed, because MiKV sets it"),
        ("--worker-cls a.B", "--worker-cls a.B is not allowed, because MiKV sets it"),
        (
            "--attention-backend TORCH_SDPA",
            "--attention-backend TORCH_SDPA is not allowed, because MiKV sets it",
        ),
        (
            '--attention-config {"backend":"CPU_ATTN"}',
            "--attention-backend CPU_ATTN is not allowed",
        ),
        ("--kv-sharing-fast-prefill", "--kv-sharing-fast-prefill"),
        ("--enable-dbo", "--enable-dbo"),
    ],
)
def test_flag_is_refused_by_name(flags, said):
    args, _ = parse(flags.split())
    with pytest.raises(Refusal) as refusal:
        refusals.check_flags(vars(args))
    assert str(refusal.value).startswith(said)
    assert str(refusal.value).count(". ") == 0


def test_defaults_and_native_dtypes_pass():
    for flags in ([], ["--kv-cache-dtype", "bfloat16"], ["--attention-backend", "auto"]):
        args, _ = parse(flags)
        refusals.check_flags(vars(args))


def test_refused_flag_ends_with_code_2(capsys, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "mikv")
    with pytest.raises(SystemExit) as end:
        main(["--kv-cache-dtype", "fp8"])
    assert end.value.code == 2
    assert "mikv-serve: error: --kv-cache-dtype fp8" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--grpc"])
def test_frontend_that_bypasses_us_is_refused(flag):
    args, _ = parse([flag])
    with pytest.raises(Refusal, match=flag):
        refusals.check_frontend(vars(args))


def test_rust_frontend_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(Refusal, match="VLLM_USE_RUST_FRONTEND"):
        refusals.check_frontend({})


def speculative(method: str, **differs) -> SimpleNamespace:
    """As much of a SpeculativeConfig as the check reads."""
    flags = {"disable_padded_drafter_batch": False, "parallel_drafting": False}
    has_layers = method in ("eagle", "draft_model")
    heads = {"model": "some/drafts", "get_num_kv_heads": lambda parallel: 8}
    head_dim = differs.pop("head_dim", 64)
    drafts = SimpleNamespace(**heads, get_head_size=lambda: head_dim)
    return SimpleNamespace(
        method=method,
        uses_draft_kv_cache=lambda: has_layers,
        draft_model_config=drafts,
        **(flags | differs),
    )


def config(
    cache_dtype: str = "auto", speculative=None, transfer=None, device: str = "cpu", **model
) -> SimpleNamespace:
    """As much of a VllmConfig as the check reads; a plain model unless told otherwise."""
    fields = {
        "model": "some/model",
        "is_encoder_decoder": False,
        "runner_type": "generate",
        "use_mla": False,
        "is_attention_free": False,
        "is_hybrid": False,
        "uses_alibi": False,
        "dtype": "torch.bfloat16",
        "hf_text_config": SimpleNamespace(
            layer_types=model.pop("layer_types", None),
            num_kv_shared_layers=model.pop("shared", 0),
        ),
    }
    window, head_dim = model.pop("window", None), model.pop("head_dim", 64)
    not_hybrid = model.pop("not_hybrid", False)
    return SimpleNamespace(
        model_config=SimpleNamespace(
            **(fields | model),
            get_sliding_window=lambda: window,
            get_head_size=lambda: head_dim,
            get_num_kv_heads=lambda parallel: 8,
        ),
        parallel_config=None,
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=not_hybrid),
        speculative_config=speculative,
        kv_transfer_config=transfer,
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        device_config=SimpleNamespace(device_type=device),
    )


@pytest.mark.parametrize(
    ("differs", "said"),
    [
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"runner_type": "pooling"}, "pooling"),
        ({"use_mla": True}, "MLA"),
        ({"is_hybrid": True}, "state-space"),
        ({"uses_alibi": True}, "ALiBi"),
        ({"shared": 10}, "share a KV cache"),
        ({"layer_types": ["sliding_attention"]}, "no layer attends"),
        ({"layer_types": ["chunked_attention", "linear_attention"]}, "no layer attends"),
        ({"window": 4096}, "no layer attends"),
        ({"layer_types": 3 * ["full_attention"] + ["sliding_attention"]}, "cache groups"),
        (
            {"layer_types": ["full_attention", "sliding_attention"], "not_hybrid": True},
            "--disable-hybrid-kv-cache-manager",
        ),
        ({"head_dim": 32}, "head size is 32"),
        ({"head_dim": 320}, "head size is 320"),
        ({"head_dim": 100}, "head size is 100"),
        ({"dtype": "torch.float32"}, "--dtype float32"),
        ({"cache_dtype": "fp8_e4m3"}, "--kv-cache-dtype fp8_e4m3"),
        ({"speculative": speculative("medusa")}, r"the method medusa .* ngram, suffix"),
        ({"speculative": speculative("eagle", parallel_drafting=True)}, "parallel_drafting"),
        (
            {"speculative": speculative("eagle", disable_padded_drafter_batch=True)},
            "disable_padded_drafter_batch",
        ),
        (
            {"speculative": speculative("draft_model", head_dim=128)},
            "some/drafts .* 8 KV heads of size 128, but the model has 8 of size 64",
        ),
        ({"transfer": object()}, "--kv-transfer-config"),
    ],
)
def test_model_is_refused_in_one_sentence(differs, said):
    with pytest.raises(Refusal, match=said) as refusal:
        refusals.check(config(**differs))
    assert str(refusal.value).endswith(".")


@pytest.mark.parametrize(
    "differs",
    [
        {},
        {"head_dim": 128, "dtype": "torch.float16"},
        {"layer_types": ["sliding_attention", "full_attention"], "window": 4096},
        {"layer_types": 13 * ["full_attention"] + 12 * ["sliding_attention"]},
        {"layer_types": ["full_attention"], "not_hybrid": True},
        {"speculative": speculative("eagle")},
        {"speculative": speculative("draft_model")},
    ],
)
def test_model_with_full_attention_passes(differs):
    refusals.check(config(**differs))


def test_speculation_is_refused_on_gpus(monkeypatch):
    monkeypatch.setattr(refusals, "_check_gpu", lambda: None)
    ngrams = speculative("ngram")
    refusals.check(config(speculative=ngrams))
    with pytest.raises(Refusal, match=r"--speculative-config .* GPU kernels"):
        refusals.check(config(speculative=ngrams, device="cuda"))


def test_gpu_that_the_kernels_are_not_made_for_is_refused():
    with pytest.raises(Refusal, match=r"compute capability 8\.0"):  # here the platform is the CPU
        refusals.check(config(device="cuda"))
