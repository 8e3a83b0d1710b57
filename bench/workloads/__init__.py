"""What is measured on: shapes, layers, models, prompts, routings."""
