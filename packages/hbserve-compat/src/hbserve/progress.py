"""The progress bar of several prompts, on stderr."""

import sys
from typing import Any


def progress_bar(num_prompts: int, *, is_shown: bool = True, title: str = "Generating") -> Any:
    """tqdm's; none where there is no stderr, as under pythonw: tqdm would fail there, and with it the answers."""
    from tqdm import tqdm

    is_shown = is_shown and sys.stderr is not None
    return tqdm(total=num_prompts, desc=title, disable=not is_shown, dynamic_ncols=True)
