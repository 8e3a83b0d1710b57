"""The command line: one module per sub-command, shared flags in ``options``."""
