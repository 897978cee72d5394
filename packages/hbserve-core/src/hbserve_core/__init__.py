"""The engine of HBServe: models, a paged KV pool, batching, and GpuInstance."""

from hbserve_core.block_manager import BlockManager
from hbserve_core.config import InstanceConfig
from hbserve_core.engine import Engine
from hbserve_core.engine_output import EngineStats, Reservation, StepOutput
from hbserve_core.errors import (
    EngineStopped,
    HBServeCoreError,
    InstanceFailed,
    InvalidInstanceConfig,
    ModelFilesMissing,
    NotEnoughMemory,
    RankFailed,
    UnsupportedModel,
    WeightsMismatch,
)
from hbserve_core.gpu_instance import GpuInstance
from hbserve_core.instance_process import run_instance
from hbserve_core.model_runner import ModelRunner
from hbserve_core.runner_choice import make_runner

__all__ = [
    "BlockManager",
    "Engine",
    "EngineStats",
    "EngineStopped",
    "GpuInstance",
    "HBServeCoreError",
    "InstanceConfig",
    "InstanceFailed",
    "InvalidInstanceConfig",
    "ModelFilesMissing",
    "ModelRunner",
    "NotEnoughMemory",
    "RankFailed",
    "Reservation",
    "StepOutput",
    "UnsupportedModel",
    "WeightsMismatch",
    "make_runner",
    "run_instance",
]
