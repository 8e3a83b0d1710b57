"""What interpreted tests share."""

from support.interpreted import patched_once as patched_once
