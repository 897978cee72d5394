"""Memory that transfers read and write, and how its blocks are copied. Knows no peer."""
