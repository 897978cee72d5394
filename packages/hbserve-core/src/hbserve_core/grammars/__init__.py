"""Grammars that answers are to follow, by llguidance: compiled, and advanced by output tokens, in threads of their own.

A schema may be made to take long: nothing here is waited for by the engine's thread for longer than a moment.
"""
