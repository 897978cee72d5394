"""The receiving side of transfers."""
