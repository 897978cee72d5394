"""The commands `hbserve bench …`: measurements of this machine, and of servers."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from hbserve.commands.command import LogLevel, LogLevelOption, explaining, run, taking
from hbserve.load.args import BenchServeArgs, CompareArgs
from hbserve.options import Dtype, number_option, ranks_option

bench = typer.Typer(help="Measure this machine, or a server.", no_args_is_help=True)


class Workload(StrEnum):
    MIXED = "mixed"
    SINGLE = "single"
    PREFILL = "prefill"
    DECODE = "decode"


@bench.command()
def engine(
    model: Annotated[Path | None, typer.Option(help="A Hugging Face model folder; without it, the demo model.")] = None,
    workload: Annotated[
        list[Workload] | None, typer.Option(help="Workload to run; may be repeated. By default all four.")
    ] = None,
    scale: Annotated[
        float | None, number_option("Size of the workloads; 1 on a GPU, and 1/32 elsewhere.", least=0.001, most=1000)
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Measure a decode step's time by batch size instead.")] = False,
    batch_sizes: Annotated[
        str | None, typer.Option(metavar="1,2,…", help="With --sweep; up to 256 on a GPU, up to 32 elsewhere.")
    ] = None,
    contexts: Annotated[
        str | None, typer.Option(metavar="64,512,…", help="With --sweep: prompt lengths; 512 on a GPU, 64 elsewhere.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="With --sweep: write a JSON object for each row to this file.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="Device: cpu or cuda:N; auto is the first GPU, or else the CPU.")
    ] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Number format to compute in; auto is the model's own.")] = Dtype.AUTO,
    random_weights: Annotated[
        bool, typer.Option(help="Read config.json only, and make the weights up: times are the same.")
    ] = False,
    tensor_parallel_size: Annotated[int, ranks_option("Number of GPUs that the model is split over.")] = 1,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """One engine alone, on nano-vllm's workload, one stream, prompts only, and decodes only; or by batch size."""
    from hbserve.load.bench_engine import EngineUnderTest, bench_engine, sweep_engine

    _refuse_options_of_the_other_kind(sweep, [workload, scale], [batch_sizes, contexts, json])
    chosen = EngineUnderTest(model, device, dtype.value, random_weights, tensor_parallel_size)
    with explaining(log_level):
        if sweep:
            sweep_engine(chosen, batch_sizes, contexts, json)
        else:
            bench_engine(chosen, [each.value for each in workload or Workload], scale)


def _refuse_options_of_the_other_kind(sweep: bool, of_workloads: list[Any], of_sweep: list[Any]) -> None:
    if sweep and any(given is not None for given in of_workloads):
        raise typer.BadParameter("--workload and --scale are not for --sweep")
    if not sweep and any(given is not None for given in of_sweep):
        raise typer.BadParameter("--batch-sizes, --contexts and --json need --sweep")


def _serve(args: BenchServeArgs, log_level: LogLevel) -> None:
    """Send a load to a server of OpenAI's API, with the options of `vllm bench serve`, and report what clients felt."""
    from hbserve.load.bench_serve import bench_serve

    is_saved = args.save_result or args.append_result
    if not is_saved and (args.save_detailed or args.result_dir or args.result_filename):
        raise typer.BadParameter("--save-detailed, --result-dir and --result-filename need --save-result")

    async def job() -> None:
        await bench_serve(args)

    run(job(), log_level)


bench.command("serve")(taking(BenchServeArgs, _serve))


def _compare(args: CompareArgs, log_level: LogLevel) -> None:
    """Compare hybrid instances with prefill and decode apart, on the same devices, and say which to take."""
    from hbserve.load.compare import compare

    run(compare(args), log_level)


bench.command("compare")(taking(CompareArgs, _compare))
