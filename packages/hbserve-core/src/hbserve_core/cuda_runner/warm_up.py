"""Steps before any request: who comes first would wait until kernels are compiled, or loaded by the device.

Which kernels run depends on a step's rows, and on how many of them are sampled. Steps that have a graph are run when
that is captured; here are the others.
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
    """Queue steps of padding only. Returns the last of them, which is the largest that there can be, and what its last
    layer gives for every row, (T, E).

    memory: a step's, on the device. sampled: (R,) int32, for as many rows as are ever sampled.
    """
    for shape in shapes.without_graph:
        view = StepView(memory, shape)
        view.clear()
        (decoder.hidden if shape.tiles else decoder.decode)(view, sampled, pool)
    view = StepView(memory, largest)
    view.clear()
    hidden, samples = decoder.hidden(view, sampled, pool, every_row=True), view.samples
    # A prompt's last rows are sampled behind a graph, so many as end in the step.
    for num_samples in decode_buckets(len(sampled)):
        view.samples = samples[:, :num_samples]
        decoder.finish(view, hidden, sampled)
    return view, hidden
