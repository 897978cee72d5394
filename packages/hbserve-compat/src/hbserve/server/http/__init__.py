"""HTTP: the socket, bodies in both directions, errors, API keys, figures, and a log line for each request."""
