"""KV transfers of all ranks of an instance as one."""
