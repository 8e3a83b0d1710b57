"""Other implementations measured beside ours; each optional, none of them a dependency of the packages."""
