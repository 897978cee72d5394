"""Integrations by which hbserve-kv moves the KV of other engines, each through the engine's own plugin interface."""
