"""Measures what an engine reaches, and what its device could: `hbserve bench engine`."""
