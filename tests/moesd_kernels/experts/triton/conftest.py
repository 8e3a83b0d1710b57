"""Interpreted tests only where Triton was imported to be interpreted."""

import os

# Triton reads the variable when it is first imported, which another test may have caused:
# test_interpreted.py runs that folder in a child of its own.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
