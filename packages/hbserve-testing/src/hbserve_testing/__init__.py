"""Tools that the tests of all packages share. Never published; it imports torch and the packages only where they are used."""
