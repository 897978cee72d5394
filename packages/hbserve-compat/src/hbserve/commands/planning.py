"""The commands `hbserve profile`, `simulate` and `plan`, for deployments that do not exist yet."""

import contextlib
import logging
from collections.abc import Iterator

import typer

from hbserve.commands.command import LogLevel, explaining, taking
from hbserve.simulator.commands import PlanArgs, ProfileArgs, SimulateArgs, run_plan, run_simulation


def _profile(args: ProfileArgs, log_level: LogLevel) -> None:
    """Measure one instance: prompts, decode steps and transfers, into a small file for `simulate` and `plan`."""
    from hbserve.simulator.measuring import measure_profile

    with explaining(log_level):
        measure_profile(args)


def _simulate(args: SimulateArgs, log_level: LogLevel) -> None:
    """Simulate a deployment: its scheduler as it is, in virtual time, over instances that a profile describes."""
    with explaining(log_level), _quiet_schedulers(log_level):
        run_simulation(args)


def _plan(args: PlanArgs, log_level: LogLevel) -> None:
    """Say how many instances a load needs, and whether to compute prompts and decode apart."""
    with explaining(log_level), _quiet_schedulers(log_level):
        run_plan(args)


@contextlib.contextmanager
def _quiet_schedulers(log_level: LogLevel) -> Iterator[None]:
    """Silence the warnings of simulated schedulers: they log a line for each request that a simulated fault ends, all
    within a second of real time."""
    schedulers = logging.getLogger("hbserve_scheduler")
    before = schedulers.level
    if log_level is LogLevel.WARNING:
        schedulers.setLevel(logging.ERROR)
    try:
        yield
    finally:
        schedulers.setLevel(before)


def add_to(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command("profile")(taking(ProfileArgs, _profile))
    app.command("simulate")(taking(SimulateArgs, _simulate))
    app.command("plan")(taking(PlanArgs, _plan))
