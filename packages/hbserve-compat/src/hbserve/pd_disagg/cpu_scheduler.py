"""CpuScheduler, which hbserve_scheduler owns: subclass it to schedule differently."""

from hbserve_scheduler.cpu_scheduler import CpuScheduler as CpuScheduler
from hbserve_scheduler.request import ScheduledRequest as ScheduledRequest

__all__ = ["CpuScheduler", "ScheduledRequest"]
