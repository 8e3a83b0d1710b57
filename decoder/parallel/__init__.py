"""One target over several ranks of ``torch.distributed``: rank 0 decides, all compute.

Rank 0 runs the decoder: requests, drafter, sampler, draft length, files. The others hold their
part of the target and a cache like rank 0's, and run each forward that rank 0 announces. So nothing
that depends on time, on a signal or on rounding is decided twice, and ranks cannot disagree.
"""
