"""Commands of the command line, which `hbserve.__main__` declares."""
