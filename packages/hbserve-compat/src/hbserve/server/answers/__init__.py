"""Answers to one HTTP request: from tokens as they come to the JSON or the events that clients get."""
