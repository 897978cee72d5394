"""Errors of hbserve_scheduler.

    HBServeSchedulerError
    ├── ConfigError (ValueError)         a configuration is invalid; names the key, its value and what is allowed
    ├── InstanceFailed                   an instance says that it cannot run; has its reason
    ├── NotReady (TimeoutError)          instances did not become ready in time; names them
    └── RequestFailed (RemoteError)      every attempt at a request failed; says what happened in each

A refused request raises hbserve_rpc's InvalidRequest (never send it again) or Overloaded (it may pass after
`retry_after_s`). A request for which there is no instance raises Unavailable, and one that takes longer than
`request_timeout_s` raises RequestTimeout; both are hbserve_rpc's too, and RemoteErrors as RequestFailed is.
A request for which the model gives NaN or infinity raises LogitsNotFinite after its first attempt.
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
