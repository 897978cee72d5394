"""The way of a step's rows whose requests ask for more than a token by temperature, top-k and top-p.

Both runners know it. A step without such rows runs nothing of it.
"""
