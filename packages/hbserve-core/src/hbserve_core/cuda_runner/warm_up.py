"""Steps that run before any request, because the first one would otherwise wait for kernels to be compiled or loaded.

Which kernels run depends on a step's rows, and on how many of them are sampled. Steps that have a graph are run when it
is captured; this file runs the others.
"""

import torch

from hbserve_core.cuda_runner.decoder import CudaDecoder
from hbserve_core.cuda_runner.step_packer import GraphShapes, StepShape, StepView, decode_buckets


def run_steps_without_graph(
    decoder: CudaDecoder,
    shapes: GraphShapes,
    largest: StepShape,
    memory: torch.Tensor,
    sampled: torch.Tensor,
    pool: torch.Tensor,
) -> tuple[StepView, torch.Tensor]:
    """Queue steps of padding only. Returns the last of them, which is the largest possible step, and its last layer's
    output for every row, (T, E).

    memory: memory of a step, on the device. sampled: (R,) int32, for the largest number of rows that are ever sampled.
    """
    for shape in shapes.without_graph:
        view = StepView(memory, shape)
        view.clear()
        (decoder.hidden if shape.tiles else decoder.decode)(view, sampled, pool)
    view = StepView(memory, largest)
    view.clear()
    hidden, samples = decoder.hidden(view, sampled, pool, every_row=True), view.samples
    # The last rows of prompts are sampled after a graph: as many rows as prompts end in the step.
    for num_samples in decode_buckets(len(sampled)):
        view.samples = samples[:, :num_samples]
        decoder.finish(view, hidden, sampled)
    return view, hidden
