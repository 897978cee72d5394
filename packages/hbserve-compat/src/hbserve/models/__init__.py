"""Model folders: how they are found, how GGUF files become one, and which cannot be served."""
