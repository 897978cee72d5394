"""Tensor parallelism: the processes of an instance's other ranks, and the runner over all of them."""
