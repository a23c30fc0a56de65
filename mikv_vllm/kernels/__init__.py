"""Native kernels of the tier operations, one package per device; none of them imports vLLM."""
