"""What must be refused in one line, and what every refusal has in common."""
