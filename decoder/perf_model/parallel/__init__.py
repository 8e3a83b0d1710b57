"""Expert parallelism over many ranks, as arithmetic: networks, the busiest rank, collectives."""
