"""Draft heads as their publishers write them, and what they compute."""
