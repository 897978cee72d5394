"""Tools that the tests of all packages share. This package is never published.

It imports torch and the other packages only where they are used.
"""
