"""Where speculation pays: a forward model over a grid, and what to know about its numbers."""
