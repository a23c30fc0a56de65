"""Serving benchmark: stock vLLM and MiKV servers with the same pool bytes, under the same loads."""
