"""Small models with random weights, in every shape that real ones have."""

from pathlib import Path

import torch

VOCABULARY = 512
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    # Large enough for attention to be far from uniform.
    "initializer_range": 0.08,
}


def save_model(folder: Path, architecture: str, config: str | None = None, **shape) -> Path:
    """Make a model of transformers' class ``<architecture>ForCausalLM``, in bf16.

    Args:
        config: its configuration's class, where that is not ``<architecture>Config``.
    """
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, config or f"{architecture}Config")(**SHAPE | shape)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def random_tokens(count: int, seed: int) -> list[int]:
    """Token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()
