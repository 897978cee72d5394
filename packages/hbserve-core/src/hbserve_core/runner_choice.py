"""The runner that suits an instance's device."""

from hbserve_core.config import InstanceConfig
from hbserve_core.loaded_model import choose_device
from hbserve_core.model_runner import ModelRunner
from hbserve_core.runner import Runner


def make_runner(config: InstanceConfig) -> Runner:
    """Load the model. Raises what `LoadedModel` raises, and NotEnoughMemory."""
    if choose_device(config).type != "cuda":
        return ModelRunner(config)
    # Triton is not there on every system that has no CUDA.
    from hbserve_core.cuda_runner import CudaRunner

    return CudaRunner(config)
