"""Instances on the nodes of a Ray cluster. Ray places their processes; neither tokens nor KV go through it."""
