"""Fields of a request's body, and the SamplingParams that are made from them."""
