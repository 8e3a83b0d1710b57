"""Our operations inside transformers models."""
