"""The HTML page of a folder of results: four numbers, a picture per question, every table."""
