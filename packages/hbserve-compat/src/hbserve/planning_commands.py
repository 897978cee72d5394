"""The commands `hbserve simulate` and `hbserve plan`: deployments that are not there yet."""

import typer

from hbserve.command import LogLevel, explaining, taking
from hbserve.simulator.commands import PlanArgs, SimulateArgs, run_plan, run_simulation


def _simulate(args: SimulateArgs, log_level: LogLevel) -> None:
    """Simulate a deployment: its scheduler as it is, in virtual time, over instances that a profile describes."""
    with explaining(log_level):
        run_simulation(args)


def _plan(args: PlanArgs, log_level: LogLevel) -> None:
    """Say how many instances a load needs, and whether to compute prompts and decode apart."""
    with explaining(log_level):
        run_plan(args)


def add_to(app: typer.Typer) -> None:
    """Add them to the command line."""
    app.command("simulate")(taking(SimulateArgs, _simulate))
    app.command("plan")(taking(PlanArgs, _plan))
