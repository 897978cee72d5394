"""The sending side of transfers."""
