"""An EAGLE head for the embedded model, fitted in seconds.

The head has one decoder layer. Its first matrix predicts the model's next final hidden state from
the embedding of the next token and from the current hidden state. Its attention, with random
queries, keys and values, predicts a part of what is left. Both are least-squares fits, so the head
is weak, but its drafts depend on all tokens of its cache.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

RIDGE = 0.01
"""Penalty, relative to the squares of the features."""


def fit(features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Least squares with a penalty on normalized features: a matrix ``[targets, features]``."""
    features, targets = features.flatten(0, -2), targets.flatten(0, -2)
    scale = features.std(0)
    features = features / scale
    gram = features.T @ features
    gram += RIDGE * len(features) * torch.eye(len(gram))
    return torch.linalg.solve(gram, features.T @ targets).T / scale


@torch.inference_mode()
def make_eagle_head(model_path: Path, prompts: list[list[int]], out: Path) -> Path:
    """Write an EAGLE head for the model at ``model_path`` into ``out``.

    Args:
        prompts: texts of equal length to fit the head on, as token ids.
    """
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    config, tokens = model.config, torch.tensor(prompts)
    hidden = model.model(tokens).last_hidden_state
    inputs = torch.cat([model.model.embed_tokens(tokens[:, 1:]), hidden[:, :-1]], -1)
    wanted = hidden[:, 1:]
    size, heads, kv_heads = (
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    head_dim = size // heads
    fc = fit(inputs, wanted)
    x = inputs @ fc.T

    random = torch.Generator().manual_seed(0)
    scale = 1.5 / x.std().item() / size**0.5
    projections = {
        name: torch.randn(count * head_dim, size, generator=random) * scale
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    }
    q, k, v = (
        (x @ weight.T).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        for weight in projections.values()
    )
    rotation = model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
    q, k = apply_rotary_pos_emb(q, k, *rotation)
    mixed = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    mixed = mixed.transpose(1, 2).flatten(2)
    output = fit(mixed, wanted - x)

    middle = config.intermediate_size
    layer = {f"self_attn.{name}_proj": weight for name, weight in projections.items()} | {
        "self_attn.o_proj": output,
        "mlp.gate_proj": torch.zeros(middle, size),
        "mlp.up_proj": torch.zeros(middle, size),
        "mlp.down_proj": torch.zeros(size, middle),
        "post_attention_layernorm": torch.ones(size),
    }
    weights = {"fc.weight": fc} | {f"layers.0.{name}.weight": w for name, w in layer.items()}
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}
    save_file(weights, out / "model.safetensors")
    settings = config.to_dict() | {"num_hidden_layers": 1}
    (out / "config.json").write_text(json.dumps(settings, default=str))
    return out
