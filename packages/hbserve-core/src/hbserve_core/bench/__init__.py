"""Measurements of what an engine reaches, and of what its device could: `hbserve bench engine`."""
