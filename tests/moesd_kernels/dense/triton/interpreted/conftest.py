"""What interpreted tests share, and their yardstick."""

import pytest
from support.interpreted import nothing_in_vain as nothing_in_vain
from support.interpreted import patched_once as patched_once
from support.interpreted import poisoned_empty as poisoned_empty

from moesd_kernels.dense import ops


@pytest.fixture(scope="session", autouse=True)
def cpu_operators():
    """The yardstick, ``torch.ops.moesd`` on the CPU."""
    if reason := ops.unavailable():
        pytest.skip(reason)
