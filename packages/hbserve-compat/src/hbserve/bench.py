"""`hbserve bench engine`."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import typer

from hbserve.demo_model import model_folder
from hbserve_core import InstanceConfig
from hbserve_core.engine_bench import Sizes, bench_config, run_bench
from hbserve_core.loaded_model import choose_device

_ELSEWHERE = 1 / 32


def bench_engine(
    model: Path | None, workloads: Sequence[str], scale: float | None, device: str, dtype: str, random_weights: bool,
    tensor_parallel_size: int,
) -> None:  # fmt: skip
    """Print a line for each run. Raises what `InstanceConfig` and `make_runner` raise."""
    folder = model_folder(model)
    settings = {
        "device": device, "dtype": dtype, "load_format": "dummy" if random_weights else "safetensors",
        "tensor_parallel_size": tensor_parallel_size,
    }  # fmt: skip
    config = msgspec.convert({"model_path": str(folder), **settings}, InstanceConfig)
    if scale is None:
        scale = 1.0 if choose_device(config).type == "cuda" else _ELSEWHERE
    sizes = Sizes().scaled(scale)
    typer.echo(f"{folder.name}, workloads at {scale:.3g} of their size")
    run_bench(bench_config(str(folder), sizes, **settings), sizes, workloads, typer.echo)
