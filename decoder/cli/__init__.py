"""The command line: one module per sub-command; ``options`` has flags, ``setup`` loads."""
