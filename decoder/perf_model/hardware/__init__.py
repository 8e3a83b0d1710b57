"""What a machine can do: by name, or measured."""
