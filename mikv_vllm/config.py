"""Server settings and per-request settings: the only place that validates them."""

import json
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from annotated_types import MinLen
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from mikv_vllm.tiers.formats import LADDERS, Codec, LowFormat

ADDITIONAL_CONFIG_KEY = "mikv"
"""Key under vLLM's ``--additional-config`` that carries :class:`CompressionConfig`."""

RATIO_FIELD = "kv_compression_ratio"
"""Name of the per-request setting, in a request body and in ``SamplingParams.extra_args``."""

REPORT_FIELD = "kv_compression"
"""Name of the per-request report, in a response body."""


def _read_low_formats(value: Any) -> Any:
    """Names out of a text: a file of ``mikv-eval calibrate``, or names with commas."""
    if not isinstance(value, str):
        return value
    if not value.endswith(".json"):
        return [name.strip() for name in value.split(",")]
    try:
        return json.loads(Path(value).read_text())["low_formats"]
    except FileNotFoundError:
        raise ValueError(f"there is no file {value}") from None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{value} is not a file of `mikv-eval calibrate`: {error}") from None


def _sort_low_formats(names: tuple[str, ...]) -> tuple[str, ...]:
    """Sort names, the richest format first. Raises ValueError for unknown names."""
    formats = sorted(map(LowFormat.parse, dict.fromkeys(names)), key=lambda f: -f.token_bits)
    return tuple(low_format.name for low_format in formats)


@cache
def _parse_low_formats(names: tuple[str, ...]) -> tuple[LowFormat, ...]:
    """The low formats with these names. Every step reads them."""
    return tuple(map(LowFormat.parse, names))


LowFormatNames = Annotated[
    tuple[str, ...],
    BeforeValidator(_read_low_formats),
    MinLen(1),
    AfterValidator(_sort_low_formats),
]


class CompressionConfig(BaseModel):
    """Settings of the two-tier cache, the same in every process of a server."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ratio: float = Field(default=1.0, ge=1.0, allow_inf_nan=False)
    """Compression ratio of a request that does not name one. 1.0 does not compress."""

    importance: Literal["window", "h2o"] = "window"
    """How a prompt is scored: attention of its last ``window`` queries, or of all of them
    (H2O, arXiv:2306.14048). ``h2o`` reads no prefix cache: it needs every query."""

    window: int = Field(default=32, ge=1, le=1024)
    """Queries at the prompt's end that score it, with ``importance: window``. Tokens."""

    recent: int = Field(default=16, ge=1, le=1024)
    """Newest tokens that are never demoted. Tokens."""

    decay: float = Field(default=0.98, ge=0.0, le=1.0, allow_inf_nan=False)
    """Factor on every importance score at each decode step. 1.0 never forgets."""

    high_bits: Literal[8, 16] = 8
    """Bits per number in the high tier."""

    min_tokens: int = Field(default=256, ge=64)
    """A request stays native until it holds this many tokens."""

    native_share: float = Field(default=0.5, ge=0.05, le=1.0, allow_inf_nan=False)
    """Share of all pages up to which a prompt stays uncompressed while it is computed; pages that
    hold compressed blocks of the prefix cache are not used. A longer prompt is compressed while it
    is computed, so it does not have to fit uncompressed."""

    codec: Codec = "channel"
    """Low-tier codec: keys per channel, the costly channels at more bits; or ``balanced``, the
    MiKV paper's, keys per token after its balancer, to compare with."""

    low_formats: LowFormatNames | None = Field(
        default=None,
        description="names such as K6433V3, with commas, or a file of `mikv-eval calibrate`",
    )
    """Low-tier formats that a ratio chooses from: bits of the four quarters of a key's channels,
    then of a value. None for those that were measured: see docs/quality.md."""

    @property
    def ladder(self) -> tuple[LowFormat, ...]:
        """:attr:`low_formats`, or those of the codec; richest first."""
        if self.low_formats is None:
            return LADDERS[self.codec]
        return _parse_low_formats(self.low_formats)

    @model_validator(mode="after")
    def _formats_are_the_codecs(self) -> Self:
        if foreign := [one.name for one in self.ladder if one.codec != self.codec]:
            raise ValueError(f"low_formats has {foreign[0]}, which is not of codec {self.codec}")
        return self

    @model_validator(mode="after")
    def _recent_fits(self) -> Self:
        if self.recent >= self.min_tokens:
            raise ValueError(
                f"recent is {self.recent}, but must be below min_tokens ({self.min_tokens})"
            )
        return self

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> Self | None:
        """Read the settings out of vLLM's ``additional_config``; None if MiKV was not asked for."""
        if not isinstance(additional_config, dict):
            return None
        settings = additional_config.get(ADDITIONAL_CONFIG_KEY)
        return None if settings is None else cls.model_validate(settings)

    def to_additional_config(self) -> dict[str, Any]:
        """The ``additional_config`` entry that :meth:`from_additional_config` reads."""
        return {ADDITIONAL_CONFIG_KEY: self.model_dump()}


class RatioError(ValueError):
    """A compression ratio that is not a number or out of range."""


def parse_ratio(value: Any, largest: float, field: str = RATIO_FIELD) -> float:
    """Check one compression ratio.

    Args:
        value: what the user gave. A string that contains a number is taken as the number:
            environment variables and some clients can only pass strings.
        largest: the largest ratio of the served model, from
            :func:`mikv_vllm.tiers.plan.largest_ratio`.
        field: name of the field or flag, for the message.

    Raises:
        RatioError: one sentence with the field, the value and the range.
    """
    allowed = f"allowed is a number from 1.0 (uncompressed) to {largest:g}"
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = None
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise RatioError(f"{field} is {value!r}, which is not a number; {allowed}.")
    if not 1.0 <= number <= largest:  # false for NaN
        raise RatioError(f"{field} is {value!r}, which is out of range; {allowed}.")
    return float(number)
