"""How anything is measured and written down: timers, ceilings, lines."""
