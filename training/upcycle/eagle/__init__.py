"""The EAGLE-3 head: what the target says of texts, the head, its loss and its training."""
