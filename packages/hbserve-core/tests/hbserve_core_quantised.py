"""Checkpoints of 8-bit floats and of 4 bits, made of others, beside what they mean in floats."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""What AutoAWQ puts into an int32, the lowest bits first."""


def packed(numbers, order=(0, 1, 2, 3, 4, 5, 6, 7)):
    """(N, M) numbers to (N, M / 8) int32."""
    eight = numbers.view(len(numbers), -1, 8).to(torch.int64)
    whole = sum(eight[:, :, place] << (4 * bit) for bit, place in enumerate(order))
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).to(torch.int32)


def invented(kind, outputs, inputs, size, generator):
    """A weight in float32, and what stands for it."""
    size = inputs if kind == "gptq one group" else size
    numbers = torch.randint(0, 16, (inputs, outputs), generator=generator)
    zeros = torch.randint(1, 16, (inputs // size, outputs), generator=generator)
    scales = (torch.rand(inputs // size, outputs, generator=generator) * 0.1 + 0.02).half()
    groups = torch.arange(inputs) // size
    if kind == "gptq act-order":
        # It follows from what comes in, so projections of the same inputs have the same.
        groups = groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
    weight = ((numbers - zeros[groups]) * scales.float()[groups]).t().contiguous()
    if kind == "awq":
        return weight, {"qweight": packed(numbers, AWQ_ORDER), "qzeros": packed(zeros, AWQ_ORDER), "scales": scales}
    stored = {
        "qweight": packed(numbers.t()).t().contiguous(),
        "qzeros": packed(zeros - int(kind != "gptq_v2")),
        "scales": scales,
        "g_idx": groups.to(torch.int32),
    }
    return weight, stored


def write(source, where, kind, size=16):
    narrow, wide = where / "narrow", where / "wide"
    for folder in (narrow, wide):
        shutil.copytree(source, folder)
    weights, generator = load_file(source / "model.safetensors"), torch.Generator().manual_seed(3)
    small: dict[str, torch.Tensor] = {}
    large: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            large[name], parts = invented(kind, weight.shape[0], weight.shape[1], size, generator)
            small |= {name.replace("weight", part): tensor for part, tensor in parts.items()}
        else:
            small[name] = large[name] = weight
    save_file(small, narrow / "model.safetensors", {"format": "pt"})
    save_file(large, wide / "model.safetensors", {"format": "pt"})
    method = "awq" if kind == "awq" else "gptq"
    change(narrow, quant_method=method, bits=4, group_size=-1 if kind == "gptq one group" else size)
    if method == "awq":
        change(narrow, version="gemm", zero_point=True)
    else:
        change(narrow, checkpoint_format=kind if kind == "gptq_v2" else "gptq", desc_act=kind == "gptq act-order")
    return narrow, wide


def change(folder, **quantization):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = config.get("quantization_config", {}) | quantization
    (folder / "config.json").write_text(json.dumps(config))


def quantised(folder, block, as_compressed_tensors):
    """Make the projections in a folder 8-bit floats; returns all weights as they are meant. block: None: by row."""
    # Copies: what was loaded may be the file itself, which is written over.
    tensors = {name: each.clone() for name, each in load_file(folder / "model.safetensors").items()}
    meant, stored = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if "_proj" not in name:
            continue
        rows, columns = weight.shape
        down, across = block or (1, columns)
        padded = torch.nn.functional.pad(weight, (0, -columns % across, 0, -rows % down))
        blocks = padded.view(padded.shape[0] // down, down, padded.shape[1] // across, across)
        scales = blocks.abs().amax((1, 3)) / 448
        narrow = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        meant[name] = (narrow.float() * scales[:, None, :, None]).view(padded.shape)[:rows, :columns].clone()
        stored[name] = narrow.float().view(padded.shape)[:rows, :columns].to(torch.float8_e4m3fn).contiguous()
        stored[f"{name}_scale" if as_compressed_tensors else f"{name}_scale_inv"] = scales
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = (
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float"}}}}
        if as_compressed_tensors
        else {"quant_method": "fp8", "weight_block_size": block, "activation_scheme": "dynamic"}
    )
    (folder / "config.json").write_text(json.dumps(config))
    return meant
