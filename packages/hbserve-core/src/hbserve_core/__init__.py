"""The engine of HBServe: models, a paged KV pool, batching, and GpuInstance."""

from hbserve_core.config import InstanceConfig
from hbserve_core.engine.block_manager import BlockManager
from hbserve_core.engine.engine import Engine
from hbserve_core.engine.outputs import EngineStats, Reservation, StepOutput
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
from hbserve_core.instance.gpu_instance import GpuInstance
from hbserve_core.instance.process import run_instance
from hbserve_core.ranks.make_runner import make_runner
from hbserve_core.torch_runner.runner import ModelRunner

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
