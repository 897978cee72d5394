"""A running deployment as people watch it: figures, a live view, and timelines of requests."""
