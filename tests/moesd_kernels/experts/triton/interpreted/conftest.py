"""What interpreted tests share."""

import torch
from support.interpreted import exact_bfloat16 as exact_bfloat16
from support.interpreted import nothing_in_vain as nothing_in_vain
from support.interpreted import patched_once as patched_once
from support.interpreted import poisoned_empty as poisoned_empty

torch.set_num_threads(1)
