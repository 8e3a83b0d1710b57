"""Interpreted tests stay out: test_interpreted.py runs them in a child."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
