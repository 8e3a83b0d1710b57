"""Processes that are the ranks of one run, and what they do in tests."""
