"""``mikv-serve``: ``vllm serve`` with a two-tier KV cache."""

import copy
import logging
import sys
from argparse import Namespace
from typing import Any, NoReturn

from mikv_vllm import compatibility
from mikv_vllm.config import CompressionConfig, RatioError
from mikv_vllm.models import EMBEDDED_NAME, EmbeddedModelError, embedded_model
from mikv_vllm.server.wiring import allow_plugin, wire

logger = logging.getLogger("vllm.mikv")

BAD_FLAG = 2
"""Exit code for a flag that cannot be used, equal to that of argparse."""
BAD_MODEL = 1
"""Exit code for a model or a vLLM that cannot be used."""


def main(argv: list[str] | None = None) -> None:
    """Parse and check the command line, add MiKV's engine arguments, and run ``vllm serve``."""
    try:
        compatibility.check()
    except compatibility.Incompatible as error:
        leave(str(error), BAD_MODEL)
    allow_plugin()
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args

    from mikv_vllm.server.vllm_modules import cli_env_setup

    cli_env_setup()
    args, config = parse(sys.argv[1:] if argv is None else argv)
    configure_logging_from_args(args)
    prepare(args, config)
    ServeSubcommand.cmd(args)


def parse(argv: list[str]) -> tuple[Namespace, CompressionConfig]:
    """Parse the command line and its ``--config`` file, or exit with one sentence."""
    import yaml

    from mikv_vllm.server.options import config_of
    from mikv_vllm.server.parser import make_parser
    from mikv_vllm.server.vllm_modules import validate_parsed_serve_args

    parser = make_parser()
    try:
        args = parser.parse_args(argv)
        validate_parsed_serve_args(args)
        return args, config_of(args)
    except (ValueError, TypeError, AssertionError, OSError, yaml.YAMLError) as error:
        leave(str(error), BAD_FLAG)


def prepare(args: Namespace, config: CompressionConfig) -> None:
    """Choose the model, check everything that needs no engine, and add MiKV's engine arguments.

    Args:
        args: changed in place, so that ``vllm serve`` runs as MiKV with them.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext

    from mikv_vllm.server.address import check_address
    from mikv_vllm.server.refusals import Refusal, check_frontend
    from mikv_vllm.server.start import calibrated, check_and_echo

    given: dict[str, Any] = vars(args)
    args.model = args.model_tag or args.model
    embedded = args.model is None
    try:
        check_frontend(given)
        wired = wire(given, config, current_platform.device_type, embedded)
        check_address(args)
    except Refusal as error:
        leave(str(error), BAD_FLAG)
    if embedded:
        choose_embedded_model(args)
    given.update(wired)
    args.enforce_eager = bool(args.enforce_eager)
    # A copy, because vLLM creates its configuration again from the same arguments.
    engine_args = AsyncEngineArgs.from_cli_args(copy.deepcopy(args))
    vllm_config = engine_args.create_engine_config(
        usage_context=UsageContext.OPENAI_API_SERVER, headless=args.headless
    )
    config = calibrated(vllm_config, config)
    args.additional_config = args.additional_config | config.to_additional_config()
    try:
        check_and_echo(vllm_config, config, "--kv-compression-ratio")
    except RatioError as error:
        leave(str(error), BAD_FLAG)
    except Refusal as error:
        leave(str(error), BAD_MODEL)


def choose_embedded_model(args: Namespace) -> None:
    """Serve the embedded model, under its own name unless the user set one."""
    try:
        args.model = str(embedded_model())
    except EmbeddedModelError as error:
        leave(str(error), BAD_MODEL)
    args.served_model_name = args.served_model_name or [EMBEDDED_NAME]
    logger.info("No model given: serving the embedded %s.", EMBEDDED_NAME)


def leave(sentence: str, code: int) -> NoReturn:
    """Exit with one sentence on standard error."""
    print(f"mikv-serve: error: {sentence}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
