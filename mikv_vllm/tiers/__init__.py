"""The two tiers in plain Python and torch. This package does not import vLLM."""
