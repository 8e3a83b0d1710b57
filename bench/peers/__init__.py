"""Other implementations measured beside ours; each optional, none a dependency."""
