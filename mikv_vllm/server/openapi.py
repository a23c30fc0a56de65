"""The request field and the report in the server's OpenAPI schema.

vLLM generates the schema from the request models of its routes. MiKV's request field and report are
added by the middleware, so they are not in those models.
"""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, Field

from mikv_vllm.config import RATIO_FIELD, REPORT_FIELD
from mikv_vllm.server.middleware import GENERATE_ROUTES
from mikv_vllm.server.vllm_hooks import extend_schema

REPORT_SCHEMA = "KVCompressionReport"
"""Name of the report's schema."""


class KVCompressionReport(BaseModel):
    """How the KV cache of a request was compressed."""

    requested_ratio: float = Field(description="The ratio of the request, or the server's default.")
    achieved_ratio: float = Field(description="`uncompressed_kv_bytes / kv_bytes`.")
    kv_tokens: int = Field(description="Tokens in the cache at the end of the request.")
    high_tokens: int = Field(description="Of these, tokens in the high tier.")
    low_tokens: int = Field(description="Of these, tokens in the low tier.")
    reused_tokens: int = Field(description="Tokens in blocks that the prefix cache had.")
    kv_bytes: int = Field(description="Bytes of the request's pages over all layers.")
    shared_kv_bytes: int = Field(description="Of these, bytes that other running requests share.")
    uncompressed_kv_bytes: int = Field(description="Bytes of `kv_tokens` tokens at 16 bits.")
    low_format: str | None = Field(
        description="Bits of keys and values in the low tier; null if not compressed."
    )


def describe_fields(app: FastAPI) -> None:
    """Add the field and the report to the schema of every route that takes a ratio.

    Args:
        app: changed in place. Its schema is created at the first request for it, after all routes
            are registered and the largest ratio is known.
    """
    extend_schema(app, lambda schema: _extend(schema, app.state.mikv_largest_ratio))


def _extend(schema: dict[str, Any], largest: float) -> None:
    """Add the fields to an OpenAPI schema.

    vLLM's models stay unchanged, because other routes share them.
    """
    schemas = schema.setdefault("components", {}).setdefault("schemas", {})
    schemas[REPORT_SCHEMA] = KVCompressionReport.model_json_schema()
    ratio = {
        "anyOf": [{"type": "number", "minimum": 1.0, "maximum": largest}, {"type": "null"}],
        "description": "How far the KV cache of this request may be compressed; 1.0 is "
        "uncompressed. The default is the server's --kv-compression-ratio.",
    }
    report = {"$ref": f"#/components/schemas/{REPORT_SCHEMA}"}
    for path in GENERATE_ROUTES:
        if operation := schema["paths"].get(path, {}).get("post"):
            _add_property(operation.setdefault("requestBody", {}), RATIO_FIELD, ratio)
            _add_property(operation["responses"]["200"], REPORT_FIELD, report)


def _add_property(body: dict[str, Any], name: str, value: dict[str, Any]) -> None:
    media = body.setdefault("content", {}).setdefault("application/json", {})
    added = {"type": "object", "properties": {name: value}}
    media["schema"] = {"allOf": [media["schema"], added]} if media.get("schema") else added
