"""What both sides of a transfer agree on: messages, handshake, states and checksums. No I/O."""
