"""Instances and front ends as child processes of this host."""
