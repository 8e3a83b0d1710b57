"""Shared cases on the path; interpreted tests only where Triton was imported to be interpreted."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

# Triton reads the variable when it is first imported, which another test may have caused:
# test_interpreted.py runs that folder in children of its own.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
