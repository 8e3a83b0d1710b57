"""Draft heads: modules on a target's hidden states, and how they are read from their files."""
