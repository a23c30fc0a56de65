"""Benchmarks of MiKV and stock vLLM. ``python -m benchmarks`` runs the main ones."""
