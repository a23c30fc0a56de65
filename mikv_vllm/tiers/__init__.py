"""The two tiers in plain Python and torch: no vLLM import below this package."""
