"""Model as an instance's configuration asks for it: sizes, device, dtype, weights, and room for its pool."""

import hashlib
import logging
from dataclasses import replace

import torch

from hbserve_core.config import InstanceConfig
from hbserve_core.errors import InvalidInstanceConfig
from hbserve_core.model.host_memory import require_room
from hbserve_core.model.kv_pool import (
    BlockShape,
    allocate_pool,
    block_shape,
    choose_num_blocks,
    has_8_bit_floats,
    kv_dtype,
)
from hbserve_core.model.layers import DecoderWeights
from hbserve_core.model.model_config import DTYPES, ModelConfig, configured_model, torch_dtype
from hbserve_core.model.rank_group import RankGroup
from hbserve_core.model.rope import angle_table
from hbserve_core.model.shard import check_divisible
from hbserve_core.model.weights import MakeNarrow, load_weights

logger = logging.getLogger(__name__)


class LoadedModel:
    """Model, or one rank's part of it, with which every runner begins.

    Raises:
        ModelFilesMissing, UnsupportedModel, WeightsMismatch: see `load_model_config` and `load_weights`.
        InvalidInstanceConfig: a setting is not possible.
        NotEnoughMemory: this host does not have enough for the weights.
    """

    def __init__(
        self, config: InstanceConfig, group: RankGroup | None = None, make_narrow: MakeNarrow | None = None
    ) -> None:
        """make_narrow: makes layers whose weights stay in fewer than 16 bits, if the runner has kernels for them."""
        self._config = config
        self._group = group or RankGroup()
        shard = self._group.shard
        if shard.size != config.tensor_parallel_size:
            raise InvalidInstanceConfig(
                f"tensor_parallel_size={config.tensor_parallel_size}: this runner was made for {shard.size} rank; "
                "make_runner() starts the others"
            )
        model = _with_limit(configured_model(config.model_path, config), config)
        self.model_config = replace(model, keeps_inputs=model.keeps_inputs or config.keep_activations)
        check_divisible(self.model_config, shard.size)
        self.rank_config = shard.config(self.model_config)
        """Configuration with the sizes of this rank's part."""
        self.device = choose_device(config, shard.rank)
        self.dtype = _dtype(config, self.model_config)
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        in_pool = kv_dtype(config, self.dtype, self.device)
        if self.device.type == "cpu" and shard.size == 1:  # several ranks share what is available
            require_room(self.model_config, config.dtype, 1)
        given = self.model_config, config.load_format, self.dtype, self.device, shard
        if config.widen_weights or not can_stay_narrow(self.model_config, self.device):
            make_narrow = None
        self.weights = load_weights(*given, with_kv_scales=in_pool != self.dtype, make_narrow=make_narrow)
        self.block = block_shape(config, self.rank_config, in_pool)
        self.fingerprint = _fingerprint(self.model_config, self.weights, self.block)
        """Values that two instances must have in common to read each other's blocks."""

    def allocate_pool(self, reserved_bytes: int = 0) -> torch.Tensor:
        """Allocate the pool (num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim). On a GPU, `reserved_bytes`
        are left free.

        Every rank of an instance gets the same number of blocks, which hold its own heads.

        Raises:
            NotEnoughMemory: the pool does not fit.
            RankFailed: another rank could not do the same.
        """
        config, block = self._config, self.block
        limit = self.model_config.max_model_len
        num_blocks = self._group.least(choose_num_blocks(config, block, limit, self.device, reserved_bytes))
        pool = allocate_pool(num_blocks, block, self.device)
        logger.info(
            "%s: %s on %s, %s, %d blocks of %d tokens (%.2f GiB)",
            config.instance_id,
            self.model_config.architecture,
            self.device,
            self.dtype,
            num_blocks,
            config.block_size,
            num_blocks * block.block_bytes / 2**30,
        )
        return pool

    def angle_tables(self) -> list[torch.Tensor]:
        """Return each layer's table of cosines and sines of all positions, on the device; see `rope.angle_table`.
        Layers with the same rotation share one."""
        config = self.rank_config
        ropes = config.layer_ropes()
        tables = {each: angle_table(each, config.head_dim, config.max_model_len).to(self.device) for each in ropes}
        return [tables[each] for each in ropes]


def can_stay_narrow(model: ModelConfig, device: torch.device) -> bool:
    """Return whether the device can read the model's weights if they stay narrow. 8-bit floats must be a type that it
    knows."""
    return model.scale_block is None or device.type != "cuda" or has_8_bit_floats(device)


def _with_limit(model: ModelConfig, config: InstanceConfig) -> ModelConfig:
    limit = config.max_model_len
    if limit is None:
        return model
    if not 1 <= limit <= model.max_model_len:
        raise InvalidInstanceConfig(
            f"max_model_len={limit}: expected 1 to {model.max_model_len}, the model's own limit"
        )
    return model.within(limit)


def choose_device(config: InstanceConfig, rank: int = 0) -> torch.device:
    """Return the device that the configuration names, or for "auto" a CUDA device if there is one. Ranks have
    consecutive GPUs, beginning with that one.

    Raises:
        InvalidInstanceConfig: there is no such device.
    """
    if config.device == "auto":
        return _auto_device(config, rank)
    device = torch.device(config.device)
    return _gpu(f"device={config.device!r}", device.index or 0, config, rank) if device.type == "cuda" else device


def _auto_device(config: InstanceConfig, rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if config.gpu_id is not None:
        return _gpu(f"gpu_id={config.gpu_id}", config.gpu_id, config, rank)
    size = config.tensor_parallel_size
    places = max(1, torch.cuda.device_count() // size)
    return _gpu("gpu_id=None", config.kv_rank % places * size, config, rank)


def _gpu(named: str, first: int, config: InstanceConfig, rank: int) -> torch.device:
    """Return GPU `first + rank`. All GPUs that the instance needs must exist, so that either every rank refuses or none
    does."""
    count, size = torch.cuda.device_count(), config.tensor_parallel_size
    if first + size > count:
        with_ranks = f" with tensor_parallel_size={size} needs CUDA devices {first} to {first + size - 1}"
        there = f", 0 to {count - 1}" if count else ""
        raise InvalidInstanceConfig(
            f"{named}{with_ranks if size > 1 else ''}: this host has {count} CUDA devices{there}"
        )
    return torch.device("cuda", first + rank)


def _dtype(config: InstanceConfig, model: ModelConfig) -> torch.dtype:
    if config.dtype == "auto":
        return model.dtype
    if config.dtype not in DTYPES:
        raise InvalidInstanceConfig(f"dtype={config.dtype!r}: expected auto, {', '.join(DTYPES)}")
    return torch_dtype(config.dtype)


def _fingerprint(model: ModelConfig, weights: DecoderWeights, block: BlockShape) -> dict[str, str | int]:
    # The same weights with other rotation angles make another model.
    switches = replace(model.switches, experts=None)  # two sides may distribute experts among ranks differently
    # Windows decide which blocks are sent.
    ropes = model.layer_ropes()
    described = f"{model.architecture} {switches} {model.windows} {ropes} {model.rms_norm_eps} {weights.digest}"
    scales: dict[str, str | int] = {}
    if block.dtype == torch.float8_e4m3fn:
        every = [layer.kv_scales for layer in weights.layers]
        scales["kv_scales"] = hashlib.sha256(repr(every).encode()).hexdigest()[:16] if set(every) != {(1.0, 1.0)} else 1
    return scales | {
        "model": hashlib.sha256(described.encode()).hexdigest()[:32],
        "dtype": str(block.dtype).removeprefix("torch."),
        "num_layers": block.num_layers,
        "num_kv_heads": model.num_kv_heads,
        "head_dim": block.head_dim,
        "block_size": block.block_size,
    }
