"""The transport that uses one-sided writes of Mooncake's TransferEngine."""
