"""Ways to watch a running deployment: figures, a live view, and timelines of requests."""
