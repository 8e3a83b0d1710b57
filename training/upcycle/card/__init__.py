"""The upcycled model's card: measured by ``python -m training.upcycle.card``, written from it."""
