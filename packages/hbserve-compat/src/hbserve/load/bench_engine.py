"""`hbserve bench engine`: measures one engine alone."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import typer

from hbserve.load.prompts import MOST_TOKENS
from hbserve.models.demo_model import model_folder
from hbserve.options import numbers
from hbserve.output_file import require_writable, writing
from hbserve_core import InstanceConfig
from hbserve_core.bench.batch_sweep import BATCH_SIZES, SweepPlan, SweepRow, run_sweep, sweep_config
from hbserve_core.bench.workloads import Sizes, bench_config, run_bench
from hbserve_core.model.loaded_model import choose_device

MOST_BATCH = 65_536
_ELSEWHERE = 1 / 32
_ON_A_GPU = SweepPlan(BATCH_SIZES, (512,))
_ON_A_CPU = SweepPlan(tuple(size for size in BATCH_SIZES if size <= 32), (64,))


@dataclass(frozen=True)
class EngineUnderTest:
    """The engine that is measured, as the command's arguments describe it."""

    model: Path | None
    device: str
    dtype: str
    random_weights: bool
    tensor_parallel_size: int

    def settings(self) -> dict[str, Any]:
        """Return the settings of the engine's InstanceConfig, except model_path."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "load_format": "dummy" if self.random_weights else "safetensors",
            "tensor_parallel_size": self.tensor_parallel_size,
        }

    def is_on_a_gpu(self, folder: Path) -> bool:
        """Whether the engine computes on a GPU. Raises InvalidInstanceConfig for impossible settings."""
        config = InstanceConfig(model_path=str(folder), **self.settings())
        return choose_device(config).type == "cuda"


def bench_engine(engine: EngineUnderTest, workloads: Sequence[str], scale: float | None) -> None:
    """Run the workloads, and print a line for each run. Raises what `InstanceConfig` and `make_runner` raise."""
    folder = model_folder(engine.model)
    on_gpu = engine.is_on_a_gpu(folder)
    if scale is None:
        scale = 1.0 if on_gpu else _ELSEWHERE
    sizes = Sizes().scaled(scale)
    typer.echo(f"{folder.name}, workloads at {scale:.3g} of their size")
    run_bench(bench_config(str(folder), sizes, **engine.settings()), sizes, workloads, typer.echo)


def sweep_engine(
    engine: EngineUnderTest,
    batch_sizes: str | None,
    contexts: str | None,
    rows_file: Path | None,
) -> None:
    """Measure decode steps. Prints a line for each batch size and context, and writes it to `rows_file` as JSON. The
    sizes and contexts are numbers that commas separate.

    Raises InvalidRequest, what `InstanceConfig` and `make_runner` raise, and OSError if the file cannot be written.
    """
    sizes, lengths = batch_numbers(batch_sizes), context_numbers(contexts)
    if rows_file is not None:
        require_writable("--json", rows_file)
    folder = model_folder(engine.model)
    usual = _ON_A_GPU if engine.is_on_a_gpu(folder) else _ON_A_CPU
    plan = SweepPlan(sizes or usual.batch_sizes, lengths or usual.contexts)
    config = sweep_config(str(folder), plan, **engine.settings())
    with ExitStack() as stack:
        file: TextIO | None = None

        def close() -> None:
            if rows_file is not None and file is not None:
                with writing(rows_file, in_parts=True):  # what a full disk did not take is tried again here
                    file.close()

        def keep(row: SweepRow) -> None:
            nonlocal file
            if rows_file is not None:
                with writing(rows_file, in_parts=True):
                    if file is None:  # not earlier: whatever fails before there is a row leaves no file
                        file = rows_file.open("w", encoding="utf-8", buffering=1)
                    file.write(json.dumps({"model": folder.name, **row.record()}) + "\n")

        stack.callback(close)
        typer.echo(f"{folder.name}, decode steps by batch size")
        run_sweep(config, plan, typer.echo, keep)


def batch_numbers(text: str | None) -> tuple[int, ...]:
    """Parse `--batch-sizes`; empty if it was not given. Raises InvalidRequest."""
    return () if text is None else numbers("--batch-sizes", text, int, least=1, most=MOST_BATCH)


def context_numbers(text: str | None) -> tuple[int, ...]:
    """Parse `--contexts`; empty if it was not given. Raises InvalidRequest."""
    return () if text is None else numbers("--contexts", text, int, least=1, most=MOST_TOKENS)
