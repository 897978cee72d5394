"""The agreement between both sides of a transfer: messages, handshake, states and checksums. No I/O."""
