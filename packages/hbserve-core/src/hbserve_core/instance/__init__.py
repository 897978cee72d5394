"""GpuInstance: one engine behind RPC, as an object and as a process."""
