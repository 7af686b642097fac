"""Task vectors: differences of models, what of them to add, and writing the result."""
