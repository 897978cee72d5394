"""Grammars that answers must follow, with llguidance: compiled, and advanced by output tokens, in threads of their own.

A schema may be designed to take long, so the engine's thread never waits for any of this for more than a moment.
"""
