"""Model that a Hugging Face folder describes: a rank's weights, pool and layers."""
