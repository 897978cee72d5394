"""Steps on a CUDA device: packed into one buffer, replayed from graphs, without waiting."""
