"""The model, its pool and its sampler behind one call: `run(batch)`."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from hbserve_core.attention import TorchAttention
from hbserve_core.batch import StepInput, prepare_step
from hbserve_core.config import InstanceConfig
from hbserve_core.decoder import Decoder
from hbserve_core.errors import InvalidInstanceConfig
from hbserve_core.kv_pool import BlockShape, allocate_pool, block_shape, choose_num_blocks
from hbserve_core.linear import FEWEST_ROWS
from hbserve_core.model_config import DTYPES, ModelConfig, load_model_config
from hbserve_core.runner import ComputedStep, StepTokens
from hbserve_core.sampler import Sampler
from hbserve_core.sequence import ScheduledChunk
from hbserve_core.weights import load_weights

logger = logging.getLogger(__name__)


class ModelRunner:
    """Computes steps in plain torch, one at a time, on any device. Not thread-safe, but any thread may call.

    Raises:
        ModelFilesMissing, UnsupportedModel, WeightsMismatch: see `load_model_config` and `load_weights`.
        InvalidInstanceConfig: a setting that cannot be.
        NotEnoughMemory: the pool does not fit.
    """

    overlaps = False

    def __init__(self, config: InstanceConfig) -> None:
        self.config = config
        self.model_config = _with_limit(load_model_config(config.model_path), config)
        self.device = _device(config)
        self.dtype = _dtype(config, self.model_config)
        _check_tensor_parallel(config)
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        weights = load_weights(self.model_config, config.load_format, self.dtype, self.device)
        self._decoder = Decoder(self.model_config, weights)
        block = block_shape(config, self.model_config, self.dtype)
        num_blocks = choose_num_blocks(config, block, self.model_config.max_model_len, self.device)
        self.pool = allocate_pool(num_blocks, block, self.device)
        """(num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim)"""
        self._attention = TorchAttention(self.pool, self.model_config.num_heads)
        self._sampler = Sampler()
        self._fewest_rows = FEWEST_ROWS if self.device.type == "cpu" else 1
        self.fingerprint = _fingerprint(self.model_config, weights.digest, block, config)
        """What two instances must share to read each other's blocks."""
        if config.cuda_graph_enabled and self.device.type == "cuda":
            logger.info("%s: steps run eagerly; CUDA graphs are not built yet", config.instance_id)
        logger.info(
            "%s: %s on %s, %s, %d blocks of %d tokens (%.2f GiB)",
            config.instance_id, self.model_config.architecture, self.device, self.dtype, num_blocks, config.block_size,
            num_blocks * block.block_bytes / 2**30,
        )  # fmt: skip

    def launch(self, batch: Sequence[ScheduledChunk]) -> ComputedStep:
        return ComputedStep(self.run(batch))

    def run(self, batch: Sequence[ScheduledChunk]) -> StepTokens:
        """Compute one step: write its keys and values into the pool, and sample."""
        if not batch:
            return []
        with torch.inference_mode():
            step = prepare_step(batch, self.device, self._fewest_rows)
            logits = self._logits(step)
            tokens = self._sampler.sample(logits, [batch[place].sequence for place in step.sampling_places])
        result: StepTokens = [None] * len(batch)
        for place, token in zip(step.sampling_places, tokens, strict=True):
            result[place] = token
        return result

    def _logits(self, step: StepInput) -> torch.Tensor:
        return self._decoder.logits(step, self._attention.plan(step.chunks))


def _with_limit(model: ModelConfig, config: InstanceConfig) -> ModelConfig:
    limit = config.max_model_len
    if limit is None:
        return model
    if not 1 <= limit <= model.max_model_len:
        raise InvalidInstanceConfig(
            f"max_model_len={limit}: expected 1 to {model.max_model_len}, the model's own limit"
        )
    return replace(model, max_model_len=limit)


def _device(config: InstanceConfig) -> torch.device:
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
