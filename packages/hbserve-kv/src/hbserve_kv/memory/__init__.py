"""Memory that transfers read and write, and how its blocks are copied. Nothing here knows about peers."""
