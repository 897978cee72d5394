"""A runner of CUDA's steps without CUDA: its kernels run in Triton's interpreter."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from hbserve_core import InstanceConfig, ModelRunner
from hbserve_core.cuda_runner.step_packer import SplitKV, StepPacker, StepView
from hbserve_core.engine.step import StepResult
from hbserve_core.logits.prompt_logprobs import score
from hbserve_core.logits.rows import has_grammars
from hbserve_core.logits.special_rows import PendingLogprobs, SpecialRows
from hbserve_core.model.loaded_model import LoadedModel

# Of what the two runners share, which other tests have on both: kernels take half a minute for it, interpreted.
WITHOUT_KERNELS = pytest.mark.parametrize("either_runner", ["torch"], indirect=True)
# The interpreter's numbers warn where they wrap, which is what hashing wants, and where they are none.
KERNELS = [
    pytest.mark.usefixtures("language_is_interpreted"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
"""Marks of tests that run kernels."""
WHOLE_STEPS = [*KERNELS, pytest.mark.usefixtures("fewer_programs")]
"""Marks of tests that run all kernels of a step, in which none is what is tested."""
BLOCK = 8
SIZES: dict[str, Any] = {"max_num_seqs": 5, "max_num_batched_tokens": 40, "chunk_size": 16}


class InterpretedRunner:
    """What CudaRunner does, at once and on the CPU. Steps may be padded as graphs pad them."""

    computed = None
    transfer_addresses: Sequence[str] = ()

    def __init__(self, folder, overlaps=False, graphs=True, group=None, seed=None, **settings):
        from hbserve_core.cuda_runner.decoder import CudaDecoder
        from hbserve_core.cuda_runner.kernels.prefill_attention import new_tokens_per_tile
        from hbserve_core.cuda_runner.narrow_linear import NarrowLinear

        self.config = InstanceConfig(
            model_path=str(folder), block_size=BLOCK, device="cpu", cuda_graph_enabled=graphs,
            cuda_graph_max_seq_len=64, **({"num_blocks": 96} | settings),
        )  # fmt: skip
        model = LoadedModel(self.config, group, NarrowLinear)
        self.model_config, self.device, self.overlaps = model.model_config, model.device, overlaps
        self.dtype, self.fingerprint = model.dtype, model.fingerprint
        self.pool = model.allocate_pool().fill_(float("nan"))
        sizes = model.rank_config
        tile_tokens = new_tokens_per_tile(self.dtype, (sizes.num_heads, sizes.num_kv_heads, sizes.head_dim))
        pieces = SplitKV(model.rank_config.num_kv_heads, 2)
        self.packer = StepPacker(self.config, tile_tokens, pieces, group.seed if group else seed)
        largest = self.packer.shapes.largest(self.config.max_num_batched_tokens, self.config.max_num_seqs)
        model.weights = plain(model.weights)
        self.decoder = CudaDecoder(model, largest, group)
        self.special_rows = SpecialRows(model.model_config, self.device)
        self.sampled = torch.zeros(self.config.max_num_seqs, dtype=torch.int32)
        self.memory = np.full(largest.fixed_size + self.config.max_num_seqs * 64, 12345, dtype=np.int32)
        self.used_shapes = set()
        self.left = None

    def launch(self, batch):
        step = self.packer.pack(batch, self.memory)
        self.used_shapes.add(step.shape)
        view = StepView(torch.from_numpy(self.memory[: step.used].copy()), step.shape)
        num_samples = len(step.places)
        sampled = torch.zeros(num_samples, dtype=torch.int32)
        with torch.inference_mode():
            if step.special:
                self.special_rows.prepare(step.special, self.sampled)
            if step.shape.tiles:
                if step.shape not in self.packer.shapes.prefills or step.scored:
                    view.samples = view.samples[:, :num_samples]
                found = self.decoder.hidden(view, self.sampled, self.pool, every_row=bool(step.scored))
                view.samples = view.samples[:, :num_samples]
                hidden = found.index_select(0, view.samples[0]) if step.scored else found
                if num_samples:
                    self.decoder.finish(view, hidden, self.sampled)
            else:
                hidden = found = self.decoder.decode(view, self.sampled, self.pool)
            scored = score(step.scored, lambda rows: self.decoder.logits(found[rows]), 7, self.device)
        logprobs = PendingLogprobs()

        def draw():
            with torch.inference_mode():
                found = self.special_rows.sample(
                    step.special,
                    lambda places: self.decoder.logits(hidden.index_select(0, places)),
                    lambda scores, places, rows: self.decoder.draw(view, scores, places, self.sampled, rows),
                )
            logprobs.extend(found)
            sampled.copy_(self.sampled[:num_samples])

        if step.special and not has_grammars(step.special):
            draw()
        elif step.special:
            self.left = draw
        sampled.copy_(self.sampled[:num_samples])

        def result():
            found, choices = logprobs.read(step.places)
            return StepResult(step.tokens(sampled.tolist()), found, scored.read(), choices)

        return result

    def draw(self):
        left, self.left = self.left, None
        if left is not None:
            left()

    def is_idle(self):
        return True

    def close(self):
        """Nothing to end."""


def plain(weights):
    """The CPU's packed products, as kernels want to read them: plain ones."""
    from dataclasses import replace

    from hbserve_core.model.layers import Linear

    def unpacked(linear):
        if linear is None or linear.narrow_bits:
            return linear
        weight = linear.weight.to_dense() if linear.weight.is_mkldnn else linear.weight
        # They are wider than the rows where the CPU cannot multiply 16-bit numbers.
        dtype = weights.embedding.dtype
        return Linear(weight.to(dtype), None if linear.bias is None else linear.bias.to(dtype))

    layers = tuple(
        replace(
            layer,
            **{name: unpacked(getattr(layer, name)) for name in ("qkv", "output", "gate_up", "down")},
            experts=layer.experts and replace(layer.experts, router=unpacked(layer.experts.router)),
        )
        for layer in weights.layers
    )
    return replace(weights, layers=layers, head=unpacked(weights.head))


def make_runner(folder, kind, num_blocks=96, group=None, **settings):
    """Of either kind, with small steps; "cuda kernels" overlaps its steps and pads them as graphs do."""
    settings = SIZES | {"num_blocks": num_blocks} | settings
    if kind == "torch":
        config = InstanceConfig(model_path=str(folder), block_size=BLOCK, device="cpu", **settings)
        return ModelRunner(config, group)
    pytest.importorskip("triton", reason="torch has Triton on Linux only")
    return InterpretedRunner(folder, overlaps=True, graphs=group is None, group=group, **settings)
