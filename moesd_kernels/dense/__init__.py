"""The dense operations of a decode step, row by row the same whatever the batch."""
