"""What interpreted tests share."""

from support.interpreted import nothing_in_vain as nothing_in_vain
from support.interpreted import patched_once as patched_once
