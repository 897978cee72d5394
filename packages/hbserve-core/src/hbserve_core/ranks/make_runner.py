"""Construction of the runner that suits an instance's device and number of ranks."""

import logging
from collections.abc import Callable

import torch

from hbserve_core.config import InstanceConfig
from hbserve_core.engine.step import Runner
from hbserve_core.errors import InvalidInstanceConfig
from hbserve_core.model.layers import Linear
from hbserve_core.model.loaded_model import choose_device
from hbserve_core.model.model_config import configured_model
from hbserve_core.model.narrow_weight import NarrowWeight
from hbserve_core.model.rank_group import RankGroup
from hbserve_core.model.shard import check_divisible
from hbserve_core.torch_runner.runner import ModelRunner

logger = logging.getLogger(__name__)


def _ignore_until_next_step(error: Exception) -> None:
    logger.debug("%s", error)


def make_runner(config: InstanceConfig, on_failure: Callable[[Exception], None] = _ignore_until_next_step) -> Runner:
    """Load the model and make its runner. With tensor_parallel_size > 1, the model is loaded here and in other
    processes, which `close` ends.

    on_failure: called from another thread if one of those processes is lost. The next step raises the same error.

    Raises what `LoadedModel` raises, NotEnoughMemory, and RankFailed.
    """
    if config.tensor_parallel_size == 1:
        return make_rank_runner(config, RankGroup())
    check_divisible(configured_model(config.model_path, config), config.tensor_parallel_size)
    if not torch.distributed.is_available():
        raise InvalidInstanceConfig(
            f"tensor_parallel_size={config.tensor_parallel_size}: needs a torch that was built with torch.distributed"
        )
    from hbserve_core.ranks.tensor_parallel_runner import TensorParallelRunner
    from hbserve_core.ranks.workers import Workers

    workers = Workers(config, on_failure)
    try:
        with workers.naming_the_lost_rank():
            runner = make_rank_runner(workers.config, workers.join())
            workers.wait_ready()
    except BaseException:
        workers.close()
        raise
    return TensorParallelRunner(runner, workers)


def make_rank_runner(config: InstanceConfig, group: RankGroup) -> Runner:
    """Make the runner of one rank."""
    if choose_device(config, group.shard.rank).type != "cuda":
        return ModelRunner(config, group)
    # Imported here because Triton may be missing on systems without CUDA.
    from hbserve_core.cuda_runner.runner import CudaRunner

    return CudaRunner(config, group, _make_narrow)


def _make_narrow(weight: NarrowWeight, bias: torch.Tensor | None) -> Linear:
    # Imported here because only models with such weights use its kernels.
    from hbserve_core.cuda_runner.narrow_linear import NarrowLinear

    return NarrowLinear(weight, bias)
