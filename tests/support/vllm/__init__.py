"""vLLM in tests: a stand-in for it, and what runs in the environment where it is installed."""
