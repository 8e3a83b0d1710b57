"""What interpreted tests share."""

from support.interpreted import patched_once as patched_once
from support.interpreted import poisoned_empty as poisoned_empty
