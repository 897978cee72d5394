"""Rate of loading weights, compared with its limits in the same run: a model of a given size, from safetensors files
and invented.

    python benchmarks/load_weights.py --gigabytes 16 --device cuda
    python benchmarks/load_weights.py --gigabytes 1 --device cpu
    python benchmarks/load_weights.py --gigabytes 8 --device cuda --experts

The script writes a model of random numbers to a temporary folder (`--folder` says where), loads it twice, and compares
what was loaded with what was written. The files are in the system's page cache then, so the limits are those of memory:
reading the files into small buffers, and copying from the host to the device. The peer is safetensors' own
`load_file(path, device)`. With --ranks, the part of the last of so many ranks is loaded too.
With --experts the model is a mixture of experts in 8-bit floats, whose tensors are many and small: 384 weights and as
many tensors of scales a layer.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from hbserve_core.model.checkpoint.dummy_checkpoint import DummyCheckpoint
from hbserve_core.model.checkpoint.tensor_source import TensorPart
from hbserve_core.model.checkpoint_shapes import checkpoint_shapes
from hbserve_core.model.layers import DecoderWeights, LayerWeights, Linear
from hbserve_core.model.model_config import load_model_config
from hbserve_core.model.narrow_weight import NarrowWeight
from hbserve_core.model.shard import Shard
from hbserve_core.model.weights import load_weights

DTYPE = torch.bfloat16
SHARD_BYTES = 2 << 30
# Qwen3-8B's, with as many layers as the size asks for and a small vocabulary.
SIZES = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 16384, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
}  # fmt: skip
NUM_EXPERTS = 128
# Qwen3-30B-A3B's.
MIXTURE = {
    "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "num_key_value_heads": 4, "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
}  # fmt: skip


def main() -> None:
    args = arguments()
    device = torch.device(args.device)
    synchronize(device)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="load-weights-") as temporary:
        folder = Path(temporary)
        write_config(folder, args.gigabytes, MIXTURE if args.experts else {})
        kind = "Qwen3-MoE in 8-bit floats" if args.experts else f"Qwen3 in {DTYPE}"
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {describe(device)}, {kind}")
        if not args.experts:
            measure_dummy(folder, device)
        num_bytes = write_weights(folder)
        measure_limits(folder, device, num_bytes)
        ranks = ([2] if args.experts else [2, 8]) if args.ranks is None else args.ranks
        measure_safetensors(folder, device, ranks)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="where the files are written; the system's choice by default")
    parser.add_argument("--experts", action="store_true", help="a mixture of experts in 8-bit floats")
    parser.add_argument("--ranks", type=int, nargs="*", help="2 and 8 by default, of a mixture 2")
    return parser.parse_args()


def describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, action: Callable[[], object]) -> float:
    synchronize(device)
    began_s = perf_counter()
    action()
    synchronize(device)
    return perf_counter() - began_s


def say(what: str, num_bytes: int, took_s: float) -> None:
    print(f"{what:58s} {num_bytes / 1e9:6.2f} GB in {took_s:6.2f} s = {num_bytes / took_s / 1e9:6.2f} GB/s", flush=True)


# ---- the model -------------------------------------------------------------------------------------------------------


def write_config(folder: Path, gigabytes: float, more: dict[str, Any]) -> None:
    raw = SIZES | {"architectures": ["Qwen3ForCausalLM"], "torch_dtype": "bfloat16", "eos_token_id": 0}
    raw |= {"rope_theta": 1e6, "tie_word_embeddings": True, **more}
    sizes = []
    for num_layers in (1, 2):
        (folder / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": num_layers}))
        shapes = checkpoint_shapes(load_model_config(folder))
        sizes.append(sum(itemsize(name, bool(more)) * int(np.prod(shape)) for name, shape in shapes.items()))
    num_layers = max(1, round((gigabytes * 1e9 - sizes[0]) / (sizes[1] - sizes[0])) + 1)
    (folder / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": num_layers}))


def itemsize(name: str, is_mixture: bool) -> int:
    return 1 if is_mixture and name.endswith("_proj.weight") else DTYPE.itemsize


def written(name: str, shape: tuple[int, ...], is_mixture: bool, dice: np.random.Generator) -> dict[str, torch.Tensor]:
    """Make the tensor of this name, and its scales if it has some."""
    if itemsize(name, is_mixture) == 1:
        # Without the highest bit of the exponent, as below.
        values = torch.from_numpy(dice.integers(0, 1 << 8, shape, dtype=np.uint8) & 0xBF).view(torch.float8_e4m3fn)
        scales = torch.from_numpy(dice.random([-(-size // 128) for size in shape], dtype=np.float32))
        return {name: values, f"{name}_scale_inv": scales}
    # Without the highest bit of the exponent, bits are finite numbers below 2.
    bits = dice.integers(0, 1 << 16, shape, dtype=np.uint16) & 0xBFFF
    return {name: torch.from_numpy(bits).view(DTYPE)}


def write_weights(folder: Path) -> int:
    """Write files of a few GB, and their index. Returns their bytes."""
    generator = np.random.Generator(np.random.SFC64(0))
    places: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    total, number = 0, 0
    config = load_model_config(folder)
    shapes = checkpoint_shapes(config)
    for name, shape in shapes.items():
        tensors = written(name, shape, config.switches.experts is not None, generator)
        shard |= tensors
        total += sum(tensor.nbytes for tensor in tensors.values())
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES or name == list(shapes)[-1]:
            file = f"model-{number:05d}.safetensors"
            save_file(shard, folder / file)
            places |= dict.fromkeys(shard, file)
            shard, number = {}, number + 1
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return total


# ---- what is measured ------------------------------------------------------------------------------------------------


def measure_dummy(folder: Path, device: torch.device) -> None:
    config = load_model_config(folder)
    for which in ("first", "again"):
        weights = measure_load(f"load_format dummy, {which}", folder, "dummy", device)
        rows = slice(config.vocab_size - 64, config.vocab_size)
        expected = torch.empty((64, config.hidden_size), dtype=DTYPE)
        DummyCheckpoint(checkpoint_shapes(config)).read([TensorPart("model.embed_tokens.weight", rows)], expected)
        assert torch.equal(weights.embedding[rows].cpu(), expected), "the device has other numbers than the CPU"
        del weights


def measure_load(
    what: str, folder: Path, load_format: str, device: torch.device, shard: Shard | None = None
) -> DecoderWeights:
    loaded: list[DecoderWeights] = []
    config = load_model_config(folder)
    took_s = seconds(
        device,
        lambda: loaded.append(load_weights(config, load_format, DTYPE, device, shard, make_narrow=KeptNarrow)),
    )
    say(what, num_loaded(loaded[0]), took_s)
    return loaded[0]


class KeptNarrow(Linear):
    """Replacement of what multiplies by a narrow weight, which only keeps the weight."""

    def __init__(self, narrow: NarrowWeight, bias: torch.Tensor | None) -> None:
        super().__init__(narrow, bias)  # type: ignore[arg-type]

    def of_experts(self, count: int) -> Any:
        return self


def measure_limits(folder: Path, device: torch.device, num_bytes: int) -> None:
    files = sorted(folder.glob("*.safetensors"))
    for num_threads in sorted({1, len(files)}):
        with ThreadPoolExecutor(num_threads) as pool:
            took_s = seconds(device, lambda: list(pool.map(read_all, files)))
        say(f"limit: reading the files, {num_threads} at a time", num_bytes, took_s)
    host = torch.ones(256 << 20, dtype=torch.uint8)
    measure_copy("limit: copying pageable memory to the device", host, device)
    if device.type == "cuda":
        measure_copy("limit: copying pinned memory to the device", host.pin_memory(), device)
    say("peer: safetensors load_file", num_bytes, seconds(device, lambda: load_all(files, device)))


def measure_copy(what: str, host: torch.Tensor, device: torch.device) -> None:
    target = torch.empty_like(host, device=device)
    say(what, host.nbytes, min(seconds(device, lambda: target.copy_(host)) for _ in range(5)))


def read_all(path: Path) -> None:
    buffer = memoryview(bytearray(4 << 20))
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def load_all(files: list[Path], device: torch.device) -> None:
    for path in files:
        tensors = load_file(path, device=str(device))
        if device.type == "cpu":  # they are only mapped as yet
            for tensor in tensors.values():
                tensor.clone()


def measure_safetensors(folder: Path, device: torch.device, ranks: list[int]) -> None:
    for which in ("first", "again"):
        weights = measure_load(f"load_format safetensors, {which}", folder, "safetensors", device)
        check(folder, weights)
        del weights
    for size in ranks:
        name = f"load_format safetensors, rank {size - 1} of {size}"
        measure_load(name, folder, "safetensors", device, Shard(size - 1, size))


def num_loaded(weights: DecoderWeights) -> int:
    """Return the bytes of the large weights, in the checkpoint's dtype."""
    linears = [linear for layer in weights.layers for linear in linears_of(layer)]
    narrow = sum(linear.weight.nbytes for linear in linears if isinstance(linear, KeptNarrow))
    wide = sum(linear.weight.numel() for linear in linears if not isinstance(linear, KeptNarrow))
    return weights.embedding.nbytes + narrow + DTYPE.itemsize * wide


def linears_of(layer: LayerWeights) -> Iterator[Linear]:
    of_mlp: Any = layer.experts or layer
    return iter((layer.qkv, layer.output, of_mlp.gate_up, of_mlp.down))


def check(folder: Path, weights: DecoderWeights) -> None:
    """Raise AssertionError if any number is not the one that was written."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: load_file(folder / name) for name in set(index.values())}

    def stored(name: str) -> torch.Tensor:
        whole = files[index[name]][name]
        if whole.dtype == DTYPE:
            return whole
        scales = files[index[name]][f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        return whole.float() * scales[: whole.shape[0], : whole.shape[1]]

    assert torch.equal(weights.embedding.cpu(), stored("model.embed_tokens.weight"))
    for number, layer in enumerate(weights.layers):
        prefix = f"model.layers.{number}"
        attention, mlps = f"{prefix}.self_attn", [f"{prefix}.mlp"]
        if layer.experts is not None:
            mlps = [f"{prefix}.mlp.experts.{expert}" for expert in range(NUM_EXPERTS)]
        names = [
            [f"{attention}.{kind}" for kind in "qkv"],
            [f"{attention}.o"],
            [f"{mlp}.{kind}" for mlp in mlps for kind in ("gate", "up")],
            [f"{mlp}.down" for mlp in mlps],
        ]
        for linear, parts in zip(linears_of(layer), names, strict=True):
            expected = torch.cat([stored(f"{part}_proj.weight") for part in parts])
            assert torch.equal(plain(linear), expected), f"{parts[0]} and those below it differ"
    print("  every number is the one that was written")


def plain(linear: Linear) -> torch.Tensor:
    if isinstance(linear, KeptNarrow):
        return cast(NarrowWeight, linear.weight).widened().cpu()
    weight = linear.weight.to_dense() if linear.weight.is_mkldnn else linear.weight
    return weight.to("cpu", DTYPE)


if __name__ == "__main__":
    main()
