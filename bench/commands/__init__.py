"""One module per sub-command of ``python -m bench``: its flags and its table."""
