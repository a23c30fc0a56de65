"""Tests of vLLM that fail with MiKV's scheduler, and why."""

DIFFERENCES: dict[str, str] = {}
"""Reason by a part of the test's name."""
