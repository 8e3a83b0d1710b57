"""GGUF files of our models, so that llama.cpp and we run the same bytes."""
