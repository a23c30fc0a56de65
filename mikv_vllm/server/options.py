"""MiKV's own command-line options: one flag for each setting of the two-tier cache."""

import json
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from vllm.config.utils import get_attr_docs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from mikv_vllm.config import CompressionConfig
from mikv_vllm.server.refusals import Refusal

FLAGS = {
    "ratio": "--kv-compression-ratio",
    "importance": "--kv-importance",
    "window": "--kv-importance-window",
    "recent": "--kv-recent-tokens",
    "decay": "--kv-importance-decay",
    "high_bits": "--kv-high-bits",
    "min_tokens": "--kv-min-tokens",
    "native_share": "--kv-native-share",
    "codec": "--kv-codec",
    "low_formats": "--kv-low-formats",
}
"""Flag of each field of :class:`CompressionConfig`."""

GROUP = "MiKV"


def add_options(parser: FlexibleArgumentParser) -> None:
    """Add a group with one option for each field of :class:`CompressionConfig`."""
    group = parser.add_argument_group(
        GROUP, "Two-tier KV cache: every token kept, at one of two precisions."
    )
    docs = get_attr_docs(CompressionConfig)
    for name, field in CompressionConfig.model_fields.items():
        group.add_argument(
            FLAGS[name],
            type=_parser_of(name),
            default=field.default,
            metavar=FLAGS[name].rsplit("-", 1)[-1].upper(),
            help=f"{' '.join(docs[name].split())} Allowed: {allowed(name)}.",
        )


def allowed(name: str) -> str:
    """The values that a setting takes, in words."""
    field = CompressionConfig.model_fields[name]
    if field.description:
        return field.description
    if get_origin(field.annotation) is Literal:
        return " or ".join(str(choice) for choice in get_args(field.annotation))
    bounds = {
        bound: value
        for constraint in field.metadata
        for bound in ("ge", "le")
        if (value := getattr(constraint, bound, None)) is not None
    }
    kind = "a whole number" if field.annotation is int else "a number"
    upwards = f" to {bounds['le']:g}" if "le" in bounds else " upwards"
    return f"{kind} from {bounds['ge']:g}{upwards}"


def _parser_of(name: str) -> Callable[[str], Any]:
    """How argparse reads one setting."""
    field = CompressionConfig.model_fields[name]
    adapter = TypeAdapter[Any](Annotated[field.annotation, field])  # type: ignore[arg-type]

    def parse(text: str) -> Any:
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        try:
            return adapter.validate_python(value)
        except ValidationError as error:
            raise ArgumentTypeError(
                f"{text!r} is not allowed{_reason(error)}; give {allowed(name)}"
            ) from None

    return parse


def _reason(error: ValidationError) -> str:
    """Why one of our own checks refused a value, in parentheses; empty for pydantic's checks."""
    first = error.errors()[0]
    if first["type"] != "value_error":
        return ""
    return f" ({first['msg'].removeprefix('Value error, ')})"


def config_of(args: Namespace) -> CompressionConfig:
    """The settings out of parsed arguments.

    Raises:
        Refusal: two settings contradict each other.
    """
    return make_config({name: getattr(args, _dest(flag)) for name, flag in FLAGS.items()})


def make_config(settings: dict[str, Any]) -> CompressionConfig:
    """Validate settings by field name.

    Raises:
        Refusal: one sentence on the first setting that is wrong.
    """
    try:
        return CompressionConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        if name in FLAGS:
            raise Refusal(
                f"{name} is {first['input']!r}, which is not allowed{_reason(error)}; "
                f"give {allowed(name)}."
            ) from None
        if name:
            names = ", ".join(FLAGS)
            raise Refusal(f"{name!r} is not a setting of MiKV; the settings are {names}.") from None
        message = first["msg"].removeprefix("Value error, ")
        raise Refusal(f"{message[0].upper()}{message[1:]}.") from None


def _dest(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")
