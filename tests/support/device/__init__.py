"""A GPU acted by a CPU."""
