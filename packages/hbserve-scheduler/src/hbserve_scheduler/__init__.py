"""The asynchronous scheduler of HBServe, and the configuration of a deployment. Imports no torch."""

from hbserve_rpc.prompt_shape import PromptShape
from hbserve_scheduler.config import DeploymentConfig, InstanceSection, SchedulerConfig
from hbserve_scheduler.config_check import check, convert, parse_size
from hbserve_scheduler.config_file import load_config
from hbserve_scheduler.cpu_scheduler import CpuScheduler
from hbserve_scheduler.errors import ConfigError, HBServeSchedulerError, InstanceFailed, NotReady, RequestFailed
from hbserve_scheduler.event_stream import EventStream
from hbserve_scheduler.instances import InstanceHandle
from hbserve_scheduler.policies import PlacementPolicy
from hbserve_scheduler.remote import RemoteScheduler
from hbserve_scheduler.request import ScheduledRequest
from hbserve_scheduler.server import SchedulerServer

__all__ = [
    "ConfigError",
    "CpuScheduler",
    "DeploymentConfig",
    "EventStream",
    "HBServeSchedulerError",
    "InstanceFailed",
    "InstanceHandle",
    "InstanceSection",
    "NotReady",
    "PlacementPolicy",
    "PromptShape",
    "RemoteScheduler",
    "RequestFailed",
    "ScheduledRequest",
    "SchedulerConfig",
    "SchedulerServer",
    "check",
    "convert",
    "load_config",
    "parse_size",
]
