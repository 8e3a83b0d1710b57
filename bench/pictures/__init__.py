"""One file per family of pictures; each draws from JSON lines only."""
