"""A model as an instance's configuration asks for it: sizes, device, dtype, weights, and room for its pool."""

import hashlib
import logging
from dataclasses import replace

import torch

from hbserve_core.config import InstanceConfig
from hbserve_core.errors import InvalidInstanceConfig
from hbserve_core.kv_pool import BlockShape, allocate_pool, block_shape, choose_num_blocks
from hbserve_core.model_config import DTYPES, ModelConfig, load_model_config
from hbserve_core.weights import load_weights

logger = logging.getLogger(__name__)


class LoadedModel:
    """What every runner begins with.

    Raises:
        ModelFilesMissing, UnsupportedModel, WeightsMismatch: see `load_model_config` and `load_weights`.
        InvalidInstanceConfig: a setting that cannot be.
    """

    def __init__(self, config: InstanceConfig) -> None:
        self._config = config
        self.model_config = _with_limit(load_model_config(config.model_path), config)
        self.device = choose_device(config)
        self.dtype = _dtype(config, self.model_config)
        _check_tensor_parallel(config)
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self.weights = load_weights(self.model_config, config.load_format, self.dtype, self.device)
        self.block = block_shape(config, self.model_config, self.dtype)
        self.fingerprint = _fingerprint(self.model_config, self.weights.digest, self.block, config)
        """What two instances must share to read each other's blocks."""

    def allocate_pool(self, reserved_bytes: int = 0) -> torch.Tensor:
        """(num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim). On a GPU, `reserved_bytes` are left free.

        Raises:
            NotEnoughMemory: it does not fit.
        """
        config, block = self._config, self.block
        limit = self.model_config.max_model_len
        num_blocks = choose_num_blocks(config, block, limit, self.device, reserved_bytes)
        pool = allocate_pool(num_blocks, block, self.device)
        logger.info(
            "%s: %s on %s, %s, %d blocks of %d tokens (%.2f GiB)",
            config.instance_id, self.model_config.architecture, self.device, self.dtype, num_blocks, config.block_size,
            num_blocks * block.block_bytes / 2**30,
        )  # fmt: skip
        return pool


def _with_limit(model: ModelConfig, config: InstanceConfig) -> ModelConfig:
    limit = config.max_model_len
    if limit is None:
        return model
    if not 1 <= limit <= model.max_model_len:
        raise InvalidInstanceConfig(
            f"max_model_len={limit}: expected 1 to {model.max_model_len}, the model's own limit"
        )
    return replace(model, max_model_len=limit)


def choose_device(config: InstanceConfig) -> torch.device:
    """The device that the configuration names, or for "auto" a CUDA device if there is one.

    Raises:
        InvalidInstanceConfig: no such device.
    """
    if config.device == "auto":
        return _auto_device(config)
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise InvalidInstanceConfig(f"device={config.device!r}: expected 'auto', 'cpu' or 'cuda:N'") from error
    if device.type not in ("cpu", "cuda"):
        raise InvalidInstanceConfig(f"device={config.device!r}: expected 'auto', 'cpu' or 'cuda:N'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidInstanceConfig(f"device={config.device!r}: this host has {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _auto_device(config: InstanceConfig) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if config.gpu_id is not None and config.gpu_id >= count:
        raise InvalidInstanceConfig(f"gpu_id={config.gpu_id}: this host has {count} CUDA devices, 0 to {count - 1}")
    return torch.device("cuda", config.kv_rank % count if config.gpu_id is None else config.gpu_id)


def _dtype(config: InstanceConfig, model: ModelConfig) -> torch.dtype:
    if config.dtype == "auto":
        return model.dtype
    if config.dtype not in DTYPES:
        raise InvalidInstanceConfig(f"dtype={config.dtype!r}: expected auto, {', '.join(DTYPES)}")
    return DTYPES[config.dtype]


def _check_tensor_parallel(config: InstanceConfig) -> None:
    if config.tensor_parallel_size != 1:
        raise InvalidInstanceConfig(
            f"tensor_parallel_size={config.tensor_parallel_size}: an instance runs on one device for now; set it to 1"
        )


def _fingerprint(
    model: ModelConfig, weights_digest: str, block: BlockShape, config: InstanceConfig
) -> dict[str, str | int]:
    # The same weights with other rotation angles are another model.
    described = f"{model.architecture} {model.rope} {model.rms_norm_eps} {weights_digest}"
    return {
        "model": hashlib.sha256(described.encode()).hexdigest()[:32],
        "dtype": str(block.dtype).removeprefix("torch."),
        "num_layers": block.num_layers,
        "num_kv_heads": block.num_kv_heads,
        "head_dim": block.head_dim,
        "block_size": block.block_size,
        "tensor_parallel_size": config.tensor_parallel_size,
    }
