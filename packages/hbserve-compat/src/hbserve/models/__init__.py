"""Folders of models: where they are, how they come there, and which cannot be served."""
