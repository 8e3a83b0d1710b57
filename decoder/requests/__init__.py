"""What a caller asks for and gets back."""
