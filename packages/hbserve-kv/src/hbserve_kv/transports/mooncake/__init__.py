"""One-sided writes of Mooncake's TransferEngine."""
