"""A client of any server that speaks OpenAI's API, and what reads its URL and its events."""
