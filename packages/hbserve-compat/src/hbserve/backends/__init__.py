"""Backends of the synchronous LLM: one engine in this process, or a deployment in a thread."""
