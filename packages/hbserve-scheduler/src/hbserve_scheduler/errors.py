"""Errors of hbserve_scheduler.

    HBServeSchedulerError
    ├── ConfigError (ValueError)         a configuration that cannot be; names the key, its value and what is allowed
    ├── InstanceFailed                   an instance says that it cannot run; has its reason
    ├── NotReady (TimeoutError)          instances did not become ready in time; names them
    └── RequestFailed (RemoteError)      every attempt at a request failed; tells the story of each

Requests that are refused raise hbserve_rpc's InvalidRequest (never send it again) or Overloaded (after `retry_after_s`
it may pass). One that has no instance raises Unavailable, one that takes longer than `request_timeout_s`
RequestTimeout: both are hbserve_rpc's too, and RemoteErrors as RequestFailed is.
One for which the model gives NaN or infinity raises LogitsNotFinite after its first attempt.
"""

from hbserve_rpc import RemoteError


class HBServeSchedulerError(Exception):
    """Base of every error of this package."""


class ConfigError(HBServeSchedulerError, ValueError):
    pass


class InstanceFailed(HBServeSchedulerError):
    pass


class NotReady(HBServeSchedulerError, TimeoutError):
    pass


class RequestFailed(HBServeSchedulerError, RemoteError):
    pass
