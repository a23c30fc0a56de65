"""The command line of ``mikv-serve``: all of ``vllm serve``, and a group of its own."""

from argparse import Namespace

import yaml
from vllm.utils.argparse_utils import FlexibleArgumentParser

from mikv_vllm.compatibility import SUPPORTED
from mikv_vllm.server.options import GROUP, add_options
from mikv_vllm.server.vllm_modules import make_arg_parser

EPILOG = (
    "For every flag:           mikv-serve --help=all\n"
    "For a section:            mikv-serve --help=ModelConfig    (case-insensitive)\n"
    "For a flag:               mikv-serve --help=max-model-len  (_ or - accepted)\n"
)


class ServeParser(FlexibleArgumentParser):
    """vLLM's parser, whose short help also shows our own group in full."""

    def format_help(self) -> str:
        """Help as vLLM prints it; without a search word, our own options come after it."""
        text = super().format_help()
        if self._search_keyword is not None:
            return text
        group = next(group for group in self._action_groups if group.title == GROUP)
        formatter = self._get_formatter()
        formatter.start_section(GROUP)
        formatter.add_text(group.description)
        formatter.add_arguments(group._group_actions)
        formatter.end_section()
        return f"{text}\n{formatter.format_help()}"

    def parse_args(
        self, args: list[str] | None = None, namespace: Namespace | None = None
    ) -> Namespace:
        """Parse; ``--config=FILE`` means ``--config FILE``, which vLLM alone would overlook."""
        split: list[str] = []
        for arg in args or []:
            split += arg.split("=", 1) if arg.startswith("--config=") else [arg]
        return super().parse_args(split, namespace)

    def load_config_file(self, file_path: str) -> list[str]:
        """Read a YAML file of flags, including those of MiKV. An empty file has no flags.

        Raises:
            ValueError: one sentence, if there is no such file or it is not a map of flags.
        """
        expected = "it should hold one flag per line, such as `max-model-len: 4096`"
        try:
            with open(file_path) as file:
                flags = yaml.safe_load(file)
        except FileNotFoundError:
            raise ValueError(f"--config: there is no file {file_path}; {expected}.") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"--config: cannot read {file_path} ({reason}); {expected}.") from None
        if flags is None:
            return []
        if not isinstance(flags, dict):
            kind = "a list" if isinstance(flags, list) else "a single value"
            raise ValueError(f"--config: {file_path} holds {kind}; {expected}.")
        return super().load_config_file(file_path)


def make_parser() -> ServeParser:
    """The parser of ``mikv-serve``.

    ``model`` and ``enforce_eager`` are None where the user names none, so that the embedded model
    can bring its own.
    """
    parser = ServeParser(
        prog="mikv-serve",
        usage="mikv-serve [model] [--kv-compression-ratio R] [--config FILE] [options]",
        description=(
            "Serve a model over OpenAI's API as `vllm serve` does, with a KV cache of two "
            "precisions and a compression ratio per request. Without a model it serves the "
            f"embedded SmolLM2-135M-Instruct. It needs vLLM {SUPPORTED}."
        ),
        epilog=EPILOG,
    )
    make_arg_parser(parser)
    add_options(parser)
    parser.set_defaults(model=None, enforce_eager=None)
    return parser
