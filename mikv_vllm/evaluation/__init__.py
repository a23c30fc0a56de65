"""Measurement of quality: how compression of the KV cache changes the answers of a model."""
