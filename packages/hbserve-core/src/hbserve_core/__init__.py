"""Engine of HBServe: models, a paged KV pool, batching, and GpuInstance.

torch is imported with the first name that needs it: whoever only asks whether a model can be served does not wait for
it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hbserve_core.config import InstanceConfig
from hbserve_core.errors import (
    BrokenTokenizer,
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

if TYPE_CHECKING:
    from hbserve_core.engine.block_manager import BlockManager
    from hbserve_core.engine.engine import Engine
    from hbserve_core.engine.step import EngineStats, Reservation, StepOutput
    from hbserve_core.instance.gpu_instance import GpuInstance
    from hbserve_core.instance.process import run_instance
    from hbserve_core.ranks.make_runner import make_runner
    from hbserve_core.torch_runner.runner import ModelRunner

__all__ = [
    "BlockManager",
    "BrokenTokenizer",
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

_NEED_TORCH = {
    "BlockManager": "engine.block_manager",
    "Engine": "engine.engine",
    "EngineStats": "engine.step",
    "GpuInstance": "instance.gpu_instance",
    "ModelRunner": "torch_runner.runner",
    "Reservation": "engine.step",
    "StepOutput": "engine.step",
    "make_runner": "ranks.make_runner",
    "run_instance": "instance.process",
}


def __getattr__(name: str) -> Any:
    """Import a name that is not loaded yet (PEP 562)."""
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(f"{__name__}.{_NEED_TORCH[name]}"), name)
    return found


def __dir__() -> list[str]:
    return __all__
