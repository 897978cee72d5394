"""Handlers of the paths that the server answers; hbserve/server/app.py lists them."""
