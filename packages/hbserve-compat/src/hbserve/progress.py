"""The progress bar of several prompts, on stderr."""

import sys
from typing import Any


def progress_bar(num_prompts: int, *, is_shown: bool = True, title: str = "Generating") -> Any:
    """Make tqdm's progress bar. It is disabled without a stderr, as under pythonw, where tqdm would fail."""
    from tqdm import tqdm

    is_shown = is_shown and sys.stderr is not None
    return tqdm(total=num_prompts, desc=title, disable=not is_shown, dynamic_ncols=True)
