"""HTTP: the socket, bodies in both directions, errors, keys, figures, and a line in the log for each request."""
