"""One forward of a transformers model over ragged rows: cache, attention, graphs."""
