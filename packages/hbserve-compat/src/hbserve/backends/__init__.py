"""What computes for the synchronous LLM: one engine in this process, or a deployment."""
