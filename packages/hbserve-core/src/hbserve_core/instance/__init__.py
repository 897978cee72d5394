"""GpuInstance: one engine served over RPC, as an object and as a process."""
