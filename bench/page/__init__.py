"""The HTML page of a folder of results: numbers, a real model's table, pictures, every table."""
