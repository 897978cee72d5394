"""Requests, batches and blocks, which decide what the next step computes and for whom. Contains no model and no RPC."""
