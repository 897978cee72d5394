"""Transports, each imported by registry.py when it is asked for, and their common base."""
