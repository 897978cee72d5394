"""Tools for testing a transport or a backend of your own, and for testing an engine against KV transfers that fail."""

from hbserve_kv.testing.conformance import CHECKS, Check, run_check
from hbserve_kv.testing.loopback import Faults, LoopbackNetwork, LoopbackTransport, TwoSidedLoopbackTransport
from hbserve_kv.testing.rig import LAYOUTS, Rig, is_empty

__all__ = [
    "CHECKS",
    "LAYOUTS",
    "Check",
    "Faults",
    "LoopbackNetwork",
    "LoopbackTransport",
    "Rig",
    "TwoSidedLoopbackTransport",
    "is_empty",
    "run_check",
]
