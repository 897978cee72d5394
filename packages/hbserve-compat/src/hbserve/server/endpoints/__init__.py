"""Handlers of the paths that the server answers, which hbserve/server/app.py lists."""
