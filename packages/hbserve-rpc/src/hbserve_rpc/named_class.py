"""Users' own classes, which a configuration names by an entry point or as `module:Class`."""

import importlib
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any


def find_class(group: str, name: str) -> Any:
    """Return the class of the entry point of this name in `group`, or else of a name like `module:Class`, whose module
    Python can import or which is in the current folder.

    Raises ImportError or AttributeError if there is no such class.
    """
    found = entry_points(group=group)
    if name in found.names:
        return found[name].load()
    module, _, attribute = name.partition(":")
    add_current_folder()
    return getattr(importlib.import_module(module), attribute)


def add_current_folder() -> None:
    """Let Python find modules in the current folder too."""
    if not {here := str(Path.cwd()), ""} & set(sys.path):
        sys.path.append(here)  # last, so that nothing in the current folder is taken for a library
