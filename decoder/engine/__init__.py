"""The decode loop: live rows, rounds, what they cost."""
