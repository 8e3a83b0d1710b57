"""The expert layer: one op, its reference, its back-ends."""
