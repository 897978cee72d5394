"""A client of any server that speaks OpenAI's API, with parsers of the server's URL and events."""
