"""Checks that a model can be served, before anything starts and without torch. Errors say what to do instead."""

import ctypes
import json
import os
import re
from pathlib import Path

from hbserve_core import InvalidInstanceConfig
from hbserve_kv.transports.registry import require_backend
from hbserve_rpc.address import is_here
from hbserve_rpc.plain_values import shown
from hbserve_rpc.settings import EngineSettings
from hbserve_scheduler import DeploymentConfig

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_folder_at(given: Path) -> Path:
    """Return the folder that was given, as an absolute path.

    Raises:
        FileNotFoundError: there is none, or it is known to have something else; the message says what to do.
    """
    folder = Path(os.path.expanduser(given)).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(_why_no_folder(given, folder))
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise FileNotFoundError(_about_lora(folder))
        if found := sorted(folder.glob("*.gguf")):
            raise FileNotFoundError(_about_gguf(folder, found))
    return folder


def _why_no_folder(given: Path, folder: Path) -> str:
    if folder.exists():
        return f"'{folder}' is a file: give the folder that it is in"
    if _HUB_NAME.fullmatch(str(given)):
        return (
            f"model folder '{folder}' does not exist, and {given} is not in the local cache of Hugging Face's hub: "
            f"download it first (hf download {given}), or give the path of a Hugging Face folder"
        )
    return f"model folder '{folder}' does not exist: give the path of a Hugging Face folder"


def require_servable(
    folder: Path, settings: EngineSettings, tensor_parallel_sizes: set[int], num_local_instances: int = 0
) -> None:
    """Check what every instance would otherwise find out by itself, some seconds later. `settings` are those of all
    instances, and `num_local_instances` is how many of them start on this host.

    Raises:
        ModelFilesMissing, UnsupportedModel, BrokenTokenizer, WeightsMismatch, InvalidInstanceConfig, NotEnoughMemory:
            the message says what is wrong, and what to do.
    """
    from hbserve_core.model.host_memory import require_room
    from hbserve_core.model.model_config import configured_model
    from hbserve_core.model.shard import check_divisible
    from hbserve_core.model.weight_files import require_whole, weight_files

    model = configured_model(folder, settings)
    for size in sorted(tensor_parallel_sizes):
        check_divisible(model, size)
    if settings.device == "cpu" or (settings.device == "auto" and not _has_driver()):
        require_room(model, settings.dtype, num_local_instances)
    if settings.load_format != "dummy":
        for path in weight_files(folder):
            require_whole(path)


def require_settings(config: DeploymentConfig) -> None:
    """Check what needs no model, and what every instance would otherwise find out by itself, some seconds later.

    Raises:
        BackendUnavailable: (an ImportError) this host has instances, but not their backend of KV transfers.
        InvalidInstanceConfig: (a ValueError) its instances are to compute on a GPU, and it has none.
    """
    if not any(is_here(each.host) for each in config.named_instances):
        return
    require_backend(config.kv_transfer.backend)
    device = config.engine_settings().device
    if device.startswith("cuda") and not _has_driver():
        raise InvalidInstanceConfig(
            f"engine.device={device!r}: this host has no GPU driver (libcuda.so.1); expected 'auto' or 'cpu'"
        )


def _has_driver() -> bool:
    """Whether the driver of NVIDIA's GPUs is installed. Does not call it; torch could, but takes seconds to import."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _about_gguf(folder: Path, files: list[Path]) -> str:
    names = ", ".join(file.name for file in files[:8]) + (", …" if len(files) > 8 else "")
    return (
        f"'{folder}' has {len(files)} GGUF files and no config.json: give the path of one of them, which is converted "
        f"once ({names}), or a folder with safetensors, such as the original model's from Hugging Face's hub"
    )


def _about_lora(folder: Path) -> str:
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = "a model that it does not name"
    return (
        f"'{folder}' is a LoRA adapter of {shown(base)}, and adapters are not served: merge it into that model "
        "(peft: merge_and_unload(), then save_pretrained), and give the folder of the result"
    )
