"""What a sampler calls; each computes a row from that row alone and waits for nothing."""

from .probs_kernel import probs as probs
from .race_kernel import race as race
from .residual_kernel import rejection as rejection
from .verdict_kernel import agree as agree
