"""Other engines, with hbserve-kv as what moves their KV: each by the door that the engine itself has."""
