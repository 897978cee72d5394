"""Conversion of prompts to token ids, and of generated tokens to text."""
