"""A chat: messages and tools as templates take them, and reasoning and tool calls in what a model writes."""
