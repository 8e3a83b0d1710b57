"""Experts that are brought when a step needs them: how many, and what waiting for them costs."""
