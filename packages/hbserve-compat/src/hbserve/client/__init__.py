"""A client of any server that speaks OpenAI's API: of its URL, its answers' HTTP and their events."""
