"""Answers to one HTTP request: tokens as they come, and the JSON or the events that clients get."""
