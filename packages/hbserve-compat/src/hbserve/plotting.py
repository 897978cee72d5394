"""Figures by matplotlib, which is an extra: `pip install 'hbserve-compat[plot]'`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INCHES = 6.0, 3.6
"""Of one plot."""


class PlottingUnavailable(ImportError):
    """matplotlib is not installed."""


def require_plotting() -> None:
    """Raises PlottingUnavailable. To be asked before what is to be drawn takes minutes."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PlottingUnavailable("plots need matplotlib: pip install 'hbserve-compat[plot]'") from error


@contextlib.contextmanager
def figure_of(path: Path, num_rows: int, num_columns: int, title: str) -> Iterator[Any]:
    """Axes in rows and columns, to be drawn on; the file is there afterwards, of the kind that its name ends with.

    Raises:
        PlottingUnavailable: matplotlib is not installed.
        OSError, ValueError: the file cannot be written, or is of no kind that matplotlib knows.
    """
    require_plotting()
    from matplotlib.figure import Figure  # without pyplot, and so without a screen

    figure = Figure(figsize=(INCHES[0] * num_columns, INCHES[1] * num_rows), layout="constrained")
    figure.suptitle(title)
    yield figure.subplots(num_rows, num_columns, squeeze=False)
    figure.savefig(path)
