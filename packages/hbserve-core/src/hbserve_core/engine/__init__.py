"""Requests, batches and blocks: what the next step computes, and for whom. No model and no RPC."""
