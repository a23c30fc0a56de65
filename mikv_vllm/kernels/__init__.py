"""Kernels of the tier operations, one package per device. They import neither vLLM nor the server.

:class:`~mikv_vllm.kernels.layer_ops.LayerOps` is their interface.
"""
