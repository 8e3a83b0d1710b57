"""Who chooses the draft length, and what they know of costs and acceptance."""
