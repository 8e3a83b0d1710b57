"""Recurrent layers' operators over ragged rows: what is accepted is replayed, the rest is tried.

A row's state stays at its last accepted token. Row b of a batch takes ``counts[b]`` tokens, right-
padded to Q, of which the first ``keep[b]`` are accepted by now: after those the state is written
back, and the tokens behind them advance a copy that is thrown away. So a verify that may be
rejected costs no state per draft token, and the next call begins with the tokens that were kept.

Whatever a token computes depends on its row's state and tokens alone, bit for bit: neither on the
rest of the batch and on Q nor on how a row's tokens are parted between calls. Padding and rows
that are not named are never read. A row may occur twice in a batch if none of its occurrences
keeps anything; a CPU refuses it otherwise, on a GPU it is undefined.

The functions run in C++ on a CPU and in Triton on a GPU; where there is neither, in PyTorch, whose
files here are also what the others must equal.

``B`` sequences, ``Q`` tokens of each at most, ``R`` rows of states, ``Hk`` and ``Hv`` key and value
heads, ``Dk`` and ``Dv`` their sizes; in state space models ``Hh`` heads of ``P`` channels, ``G``
groups, ``N`` numbers of state a channel.
"""

from .ops import gated_delta_rule as gated_delta_rule
from .ops import gated_rms_norm as gated_rms_norm
from .ops import selective_scan as selective_scan
from .ops import selective_state_update as selective_state_update
from .ops import short_convolution as short_convolution
