"""Fields of a request's body, and the SamplingParams that they make."""
