"""The pieces of ``bench suite``, a run-book for a GPU lent for minutes."""
