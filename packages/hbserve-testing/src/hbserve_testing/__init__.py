"""Tools that the tests of all packages share: never published.

torch and the packages are imported only where they are used.
"""
