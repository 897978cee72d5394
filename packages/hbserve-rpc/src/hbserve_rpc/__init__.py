"""HBServe."""
