"""What a machine can do: described, preset, or measured."""
