"""MiKV for vLLM: a two-tier KV cache with a compression ratio per request."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mikv_vllm.server.llm import LLM

__all__ = ["LLM", "__version__"]


def __getattr__(name: str) -> Any:
    """Import :class:`LLM` on first access, because importing vLLM takes seconds."""
    if name == "LLM":
        from mikv_vllm import compatibility

        compatibility.check()
        from mikv_vllm.server.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
