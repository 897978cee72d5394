"""KV transfers of an instance, with all its ranks as one."""
