"""Transports, and their common base. registry.py imports each transport when it is asked for."""
