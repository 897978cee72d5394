"""Plots by matplotlib, which is an extra: `pip install 'hbserve-compat[plot]'`."""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hbserve.output_file import require_writable, writing
from hbserve_rpc import InvalidRequest

INCHES = 6.0, 3.6
"""Width and height of one plot."""


class PlottingUnavailable(ImportError):
    """matplotlib is not installed."""


def require_plotting(path: Path) -> None:
    """Check that a plot can be written to `path`, before the minutes of work whose result it is to show.

    Raises:
        PlottingUnavailable: matplotlib is not installed.
        InvalidRequest: the file's name does not end with .png or .svg.
        FileNotFoundError: the folder does not exist.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise PlottingUnavailable("plots need matplotlib: pip install 'hbserve-compat[plot]'")
    if path.suffix.lower() not in (".png", ".svg"):
        raise InvalidRequest(f"--plot={path}: expected a name that ends with .png or .svg")
    require_writable("--plot", path)


@contextlib.contextmanager
def figure_of(path: Path, num_rows: int, num_columns: int, title: str) -> Iterator[Any]:
    """Yield axes, in rows and columns, to draw on; then write the file, in the format of its suffix.

    Raises what `require_plotting` raises, and OSError if the file cannot be written.
    """
    require_plotting(path)
    from matplotlib.figure import Figure  # not pyplot, which would look for a screen

    figure = Figure(figsize=(INCHES[0] * num_columns, INCHES[1] * num_rows), layout="constrained")
    figure.suptitle(title)
    yield figure.subplots(num_rows, num_columns, squeeze=False)
    with writing(path):
        figure.savefig(path)
