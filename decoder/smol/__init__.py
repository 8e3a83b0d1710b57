"""The real model: SmolLM2-135M-Instruct made sparse, built once from an installed package."""
