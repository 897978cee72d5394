"""Handling of special rows: rows of a step whose requests need more than a token drawn by temperature, top-k and top-p.

Both runners use it. A step without such rows runs none of this code.
"""
