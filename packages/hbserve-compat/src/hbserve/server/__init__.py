"""The OpenAI server: HTTP in front of a scheduler. docs/openai-server.md describes what it serves."""
