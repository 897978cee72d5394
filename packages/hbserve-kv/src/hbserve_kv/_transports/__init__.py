"""Transports, imported by hbserve_kv.backends when they are asked for."""
