"""Conversion of a GGUF file to a Hugging Face folder in the user's cache directory, by transformers and only once.

A separate process converts, so that Ctrl-C can end it at once. The folder appears under its name only when it is whole,
so neither an interruption nor two processes at the same time can leave a broken one behind.
"""

import contextlib
import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from hbserve.models.gguf_settings import count_numbers, left_out

CONVERSION = "3"
"""Version of the conversion, to be raised when it changes: folders of another version are not used."""
POLL_S = 0.5
_MAGIC = b"GGUF"
_ELSEWHERE = "set XDG_CACHE_HOME to a folder that can, or give the path of a Hugging Face folder"
_NOT_WRITTEN = 3
"""Exit status of the writing process if the folder could not be written; its last line on stderr says why."""
_FLOAT32_BYTES = 4
_KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys")
"""Keys of transformers' report on loading that name tensors which do not fit the model."""


class ConversionFailed(OSError):
    """A GGUF file cannot be converted, or a package that reads it is not installed. The message says what to do."""


def converted(file: Path, given_up: threading.Event | None = None) -> Path:
    """Return the folder with the model of a GGUF file, in float32. Converts the file if that was not done before;
    `given_up` ends the conversion early.

    A changed file, or another one of the same name, gets a folder of its own.

    Raises:
        ConversionFailed: a package is missing (the message says how to install it), or the conversion failed.
    """
    with file.open("rb") as opened:
        if opened.read(len(_MAGIC)) != _MAGIC:
            raise ConversionFailed(f"'{file}' is not a GGUF file: it does not begin with {_MAGIC.decode()}")
    for module in ("gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise ConversionFailed(f"'{file}' needs the package {module} to be read: pip install gguf accelerate")
    status = file.stat()
    folder = user_cache_path("hbserve") / f"{file.stem}-{status.st_size}-{status.st_mtime_ns}-{CONVERSION}"
    convert(file, folder, "minutes, if it is large", given_up or threading.Event())
    return folder


def convert(file: Path, folder: Path, duration: str, given_up: threading.Event) -> None:
    """Make the folder, unless it exists.

    Raises:
        ConversionFailed: the conversion failed; the message says why.
    """
    if folder.exists():
        return
    with _folder_beside(folder) as scratch:
        sys.stderr.write(f"Converting {file.stem}, once, to {folder.parent}: {duration}\n")
        writer = subprocess.Popen(
            _writer_command(file, Path(scratch), folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            # Ctrl-C reaches only this process, which ends the writer. If this process is killed, the writer goes on:
            # either way the folder is whole, or not there.
            start_new_session=True,
        )
        try:
            complaint = _wait(writer, given_up)
        finally:
            writer.kill()
            writer.communicate()
    if writer.returncode != 0 and not given_up.is_set():
        last = complaint.strip().splitlines()[-1:] or [f"exit status {writer.returncode}"]
        if writer.returncode == _NOT_WRITTEN:
            reason = f"which the model does not fit into, or which failed ({last[0]})"
            raise ConversionFailed(f"'{folder.parent}' cannot be written to, {reason}: {_ELSEWHERE}")
        raise ConversionFailed(f"'{file}' cannot be converted: {last[0]}; or give the path of a Hugging Face folder")


def _folder_beside(folder: Path) -> "tempfile.TemporaryDirectory[str]":
    """Make a temporary folder beside the given one. Raises ConversionFailed if that is not possible."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True)
    except OSError as error:
        reason = f"where the model would be converted to, once ({error.strerror})"
        raise ConversionFailed(f"'{folder.parent}' cannot be written to, {reason}: {_ELSEWHERE}") from None


def _writer_command(file: Path, scratch: Path, folder: Path) -> list[str]:
    return [sys.executable, "-P", "-m", "hbserve.models.conversion", str(file), str(scratch), str(folder)]


def _wait(writer: "subprocess.Popen[str]", given_up: threading.Event) -> str:
    """Wait until the writer ends, or the conversion is given up. Returns what it wrote to stderr."""
    while not given_up.is_set():
        with contextlib.suppress(subprocess.TimeoutExpired):
            return writer.communicate(timeout=POLL_S)[1]
    return ""


def _write_model(file: Path, folder: Path) -> None:
    reader = importlib.import_module("gguf").GGUFReader(file)
    _require_room(count_numbers(reader) * _FLOAT32_BYTES, folder.parent)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": file.name, "local_files_only": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype="float32", output_loading_info=True, **source)
    model, found = loaded
    # transformers makes up the tensors that the file lacks.
    wrong = [
        f"{kind.removesuffix('_keys')} tensors ({', '.join(sorted(map(str, found[kind]))[:4])})"
        for kind in _KEYS
        if found[kind]
    ]
    # And it does not report what it leaves out.
    wrong += _surplus(reader, model)
    if wrong:
        raise ValueError(f"it is incomplete, or not of the model that it names: {'; '.join(wrong)}")
    settings = left_out(model.config.to_dict(), reader)
    # The weights are plain numbers now; without this the folder would claim to be quantized.
    del model.config.quantization_config
    model.hf_quantizer = None
    # transformers 5 would save experts stacked, as it keeps them, if a model was not loaded by its own tensor names.
    model._weight_conversions = None
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | settings, indent=2))
    except Exception as error:  # any: the libraries have their own errors for a full disk
        sys.stderr.write(f"{error}\n")
        sys.exit(_NOT_WRITTEN)


def _require_room(needed: int, folder: Path) -> None:
    """End the process unless the disk has room for so many bytes, before minutes are spent on reading the model."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        sys.stderr.write(f"it needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free\n")
        sys.exit(_NOT_WRITTEN)


def _surplus(reader: Any, model: Any) -> list[str]:
    """Return what a GGUF file has beyond the model that transformers makes of it, in words; empty if nothing."""
    names = [each.name for each in reader.tensors]
    layers = (name for name in names if name.startswith("blk."))
    beyond = [name for name in layers if int(name.split(".")[1]) >= model.config.num_hidden_layers]
    if beyond:
        return [f"{beyond[0]} is of a layer that it does not count"]
    surplus = count_numbers(reader) - sum(each.numel() for each in model.parameters())
    biases = [name for name in names if name.endswith(".bias")] or names
    return [f"{surplus} numbers of its tensors ({biases[0]}, …) have no place in a {model.config.model_type}"] * (
        surplus > 0
    )


def write_main(file: Path, scratch: Path, folder: Path) -> None:
    """Run the writing process. It writes into `scratch`, which is then renamed to `folder`, or removed."""
    try:
        _write_model(file, scratch)
        with contextlib.suppress(OSError):  # another process was faster, and its folder is as good
            scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    write_main(*map(Path, sys.argv[1:]))
