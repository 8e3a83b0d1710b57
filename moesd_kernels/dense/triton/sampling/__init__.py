"""The sampler in a few launches: distributions, exponential races, verification. For CUDA.

What is decided is what ``decoder/sampling`` decides in PyTorch: by the row alone, whatever the
batch or a program's block. Sums that a decision rests on are exact, so their order cannot matter.
Noise is the same hash, bit for bit; only exponentials and logarithms may differ from PyTorch's in
their last bits, and with them a token or a cut where two candidates are within such a bit. Draft
and target go through the same kernels, so what verification compares, or shares when coupled,
agrees exactly. Importing this package needs no Triton; importing its files does.
"""
