"""Models that draft for the embedded model, made in seconds.

An EAGLE head or MTP layer has one decoder layer. Its first matrix predicts the model's next final
hidden state from the embedding of the next token and from the current hidden state. Its attention,
with random queries, keys and values, predicts a part of what is left. Both are least-squares fits,
so the drafts are weak, but they depend on all tokens of the cache.

A draft model is the model itself without some of its layers.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

RIDGE = 0.01
"""Penalty, relative to the squares of the features."""
LEFT_OUT_LAYERS = (22, 23)
"""Layers of the embedded model that its draft model does not have."""


def fit(features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Least squares with a penalty on normalized features: a matrix ``[targets, features]``."""
    features, targets = features.flatten(0, -2), targets.flatten(0, -2)
    scale = features.std(0)
    features = features / scale
    gram = features.T @ features
    gram += RIDGE * len(features) * torch.eye(len(gram))
    return torch.linalg.solve(gram, features.T @ targets).T / scale


@dataclass
class Example:
    """What a head is fitted on: float32 ``[prompts, tokens, hidden_size]``."""

    model: torch.nn.Module
    embeddings: torch.Tensor
    """Of the next token."""
    hidden: torch.Tensor
    """Final hidden states."""
    wanted: torch.Tensor
    """Final hidden states of the next token."""

    @classmethod
    def of_model(cls, model_path: Path, prompts: list[list[int]]) -> "Example":
        """Run the model over texts of equal length, as token ids."""
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        tokens = torch.tensor(prompts)
        hidden = model.model(tokens).last_hidden_state
        return cls(model, model.model.embed_tokens(tokens[:, 1:]), hidden[:, :-1], hidden[:, 1:])


def fit_attention(
    model: torch.nn.Module, inputs: torch.Tensor, missing: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Weights of a decoder layer without MLP that predicts ``missing`` from ``inputs``."""
    config = model.config
    size, heads, kv_heads = (
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    head_dim = size // heads
    random = torch.Generator().manual_seed(0)
    scale = 1.5 / inputs.std().item() / size**0.5
    projections = {
        name: torch.randn(count * head_dim, size, generator=random) * scale
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    }
    q, k, v = (
        (inputs @ weight.T).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        for weight in projections.values()
    )
    rotation = model.model.rotary_emb(inputs, torch.arange(inputs.shape[1])[None])
    q, k = apply_rotary_pos_emb(q, k, *rotation)
    mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    middle = config.intermediate_size
    return {f"self_attn.{name}_proj": weight for name, weight in projections.items()} | {
        "self_attn.o_proj": fit(mixed.transpose(1, 2).flatten(2), missing),
        "mlp.gate_proj": torch.zeros(middle, size),
        "mlp.up_proj": torch.zeros(middle, size),
        "mlp.down_proj": torch.zeros(size, middle),
        "post_attention_layernorm": torch.ones(size),
    }


def save_model(out: Path, config: dict, weights: dict[str, torch.Tensor]) -> Path:
    """Write a model in bfloat16."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, default=str))
    return out


def copy_tokenizer(model_path: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(model_path / name, out)


@torch.inference_mode()
def make_eagle_head(model_path: Path, prompts: list[list[int]], out: Path) -> Path:
    """Write an EAGLE head for the model at ``model_path`` into ``out``."""
    example = Example.of_model(model_path, prompts)
    inputs = torch.cat([example.embeddings, example.hidden], -1)
    fc = fit(inputs, example.wanted)
    x = inputs @ fc.T
    layer = fit_attention(example.model, x, example.wanted - x)
    weights = {"fc.weight": fc} | {f"layers.0.{name}.weight": w for name, w in layer.items()}
    return save_model(out, example.model.config.to_dict() | {"num_hidden_layers": 1}, weights)


@torch.inference_mode()
def make_mtp_model(model_path: Path, prompts: list[list[int]], out: Path) -> Path:
    """Write the model at ``model_path`` with an MTP layer into ``out``, in the form of MiMo.

    MiMo is Qwen2 with MTP layers. Qwen2 is Llama with biases, which are 0 here.
    """
    example = Example.of_model(model_path, prompts)
    config, gain = example.model.config, example.model.model.norm.weight
    shape, epsilon = (config.hidden_size,), config.rms_norm_eps
    parts = (rms_norm(x, shape, eps=epsilon) for x in (example.hidden, example.embeddings))
    inputs = torch.cat([*parts], -1)
    # The last norm of the layer has the weight of the model's.
    wanted = example.wanted / gain
    projection = fit(inputs, wanted)
    x = inputs @ projection.T
    ones = torch.ones(config.hidden_size)
    layer = fit_attention(example.model, rms_norm(x, shape, eps=epsilon), wanted - x) | {
        "token_layernorm": ones,
        "hidden_layernorm": ones,
        "input_layernorm": ones,
        "input_proj": projection,
        "final_layernorm": gain,
    }
    weights = dict(example.model.state_dict())
    del weights["lm_head.weight"]
    weights |= {f"model.mtp_layers.0.{name}.weight": weight for name, weight in layer.items()}
    weights |= {
        name.replace("weight", "bias"): torch.zeros(len(weight))
        for name, weight in weights.items()
        if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj")
    }
    copy_tokenizer(model_path, out)
    settings = config.to_dict() | {
        "architectures": ["MiMoForCausalLM"],
        "model_type": "qwen2",
        "num_nextn_predict_layers": 1,
    }
    return save_model(out, settings, weights)


def make_draft_model(model_path: Path, out: Path) -> Path:
    """Write the model at ``model_path`` without :data:`LEFT_OUT_LAYERS` into ``out``."""
    config = json.loads((model_path / "config.json").read_text())
    kept = [i for i in range(config["num_hidden_layers"]) if i not in LEFT_OUT_LAYERS]
    weights = {}
    for name, weight in load_file(model_path / "model.safetensors").items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) not in kept:
                continue
            parts[2] = str(kept.index(int(parts[2])))
        weights[".".join(parts)] = weight
    copy_tokenizer(model_path, out)
    return save_model(out, config | {"num_hidden_layers": len(kept)}, weights)
