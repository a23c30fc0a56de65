"""Low formats that `mikv-eval calibrate` found for some models, by the shape of the model.

This module does not import torch.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Self

from mikv_vllm.tiers.formats import LADDER, LowFormat


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model by which its calibration is found; they also fit its fine-tunes."""

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of_config(cls, config: Any) -> Self | None:
        """The shape of a text model of transformers; None if its configuration has other fields."""
        heads = getattr(config, "num_attention_heads", None)
        hidden_size = getattr(config, "hidden_size", None)
        if not isinstance(heads, int) or not isinstance(hidden_size, int):
            return None
        return cls(
            layers=getattr(config, "num_hidden_layers", 0),
            hidden_size=hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or hidden_size // heads,
            vocabulary=getattr(config, "vocab_size", 0),
        )


@dataclass(frozen=True)
class Calibration:
    """What was measured for one model."""

    model: str
    shape: ModelShape
    low_formats: tuple[str, ...]
    """Names, richest first."""
    divergences: dict[float, float]
    """Mean KL divergence to the uncompressed cache in nats, by achieved ratio."""

    @classmethod
    def read(cls, text: str) -> Self:
        """Read a file of `mikv-eval calibrate`."""
        data = json.loads(text)
        return cls(
            data["model"],
            ModelShape(**data["shape"]),
            tuple(data["low_formats"]),
            {point["achieved"]: point["divergence"] for point in data["by_ratio"]},
        )

    def describe(self) -> str:
        """What each ratio costs, for example ``0.00010 at ratio 2.0, 0.00060 at ratio 4.0``."""
        return ", ".join(
            f"{nats:.5f} at ratio {ratio:.1f}" for ratio, nats in self.divergences.items()
        )


@cache
def known() -> tuple[Calibration, ...]:
    """The calibrations in this package."""
    folder = files("mikv_vllm.tiers") / "calibrated"
    return tuple(
        Calibration.read(file.read_text())
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".json")
    )


def ladder_of(config: Any) -> tuple[LowFormat, ...]:
    """The low formats of a model of transformers, richest first: its own, or the default ones."""
    found = find(ModelShape.of_config(config))
    return tuple(map(LowFormat.parse, found.low_formats)) if found else LADDER


def find(shape: ModelShape | None) -> Calibration | None:
    """The calibration of a model of this shape, or None."""
    return next((one for one in known() if one.shape == shape), None)
