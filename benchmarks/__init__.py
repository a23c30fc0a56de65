"""Measurements against stock vLLM, all in one run: ``python -m benchmarks``."""
