"""Benchmarks of the Triton kernels; they need no vLLM."""
