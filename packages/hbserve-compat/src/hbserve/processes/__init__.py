"""Child processes on this host: instances and front ends."""
