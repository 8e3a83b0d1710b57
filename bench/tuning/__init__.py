"""Which tiles of the expert kernels are fastest on this GPU: candidates, search, table."""
