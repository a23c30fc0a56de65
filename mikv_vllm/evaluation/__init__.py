"""Measuring what compression does to a model's answers, through the real engine."""
