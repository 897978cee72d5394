"""Loading weights: what is wrong with a folder is said at once and completely."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hbserve_core.checkpoint import Checkpoint, DummyCheckpoint
from hbserve_core.errors import ModelFilesMissing, WeightsMismatch
from hbserve_core.model_config import load_model_config
from hbserve_core.weights import checkpoint_shapes, load_weights

CPU = torch.device("cpu")


@pytest.fixture
def copy_of(model_folder, tmp_path):
    def copy(name):
        return shutil.copytree(model_folder(name), tmp_path / name)

    return copy


def load(folder, load_format="safetensors"):
    return load_weights(load_model_config(folder), load_format, torch.float32, CPU)


def test_a_folder_without_weights_says_what_it_has(copy_of):
    folder = copy_of("llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelFilesMissing, match=r"neither model\.safetensors nor .*it has: .*pytorch_model\.bin"):
        load(folder)


def test_a_missing_shard_is_named(copy_of):
    folder = copy_of("qwen2-sharded")
    (folder / "model-00002-of-00006.safetensors").unlink()
    with pytest.raises(ModelFilesMissing, match=r"lacks model-00002-of-00006\.safetensors"):
        load(folder)


@pytest.mark.parametrize("size", [0, 100, 4000])
def test_a_file_that_is_cut_off_is_named_with_its_cure(copy_of, size):
    file = copy_of("llama") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(WeightsMismatch, match=r"model\.safetensors is not a whole safetensors file .*fetch it again"):
        load(file.parent)


def test_every_wrong_tensor_is_named_in_one_error(copy_of):
    folder = copy_of("llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    tensors["lm_head.weight"] = torch.zeros(320, 32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsMismatch) as error:
        load(folder)
    for part in (
        "missing: model.norm.weight",
        "unexpected: model.layers.0.self_attn.q_proj.bias",
        "lm_head.weight has shape (320, 32), config.json asks for (320, 64)",
    ):
        assert part in str(error.value)


def test_an_index_without_a_weight_map_is_named(copy_of):
    folder = copy_of("qwen2-sharded")
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(WeightsMismatch, match=r"index\.json has no readable weight_map"):
        load(folder)


def test_tied_models_may_store_the_head_twice(copy_of):
    folder = copy_of("qwen2")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    load(folder)


def test_dummy_weights_need_no_files_and_are_the_same_each_time(copy_of):
    folder = copy_of("qwen3")
    (folder / "model.safetensors").unlink()
    first, second = load(folder, "dummy"), load(folder, "dummy")
    assert first.digest == second.digest
    assert torch.equal(first.embedding, second.embedding)
    assert first.embedding.std().item() == pytest.approx(0.02, rel=0.1)


def test_the_digest_tells_models_apart(copy_of):
    folder = copy_of("llama")
    original = load(folder).digest
    assert load(folder).digest == original
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1.01
    save_file(tensors, folder / "model.safetensors")
    assert load(folder).digest != original


def test_shards_hold_what_one_file_holds(model_folder):
    config = load_model_config(model_folder("qwen2-sharded"))
    shapes = checkpoint_shapes(config)
    checkpoint = Checkpoint(config, shapes)
    assert {name: tuple(checkpoint.get(name).shape) for name in shapes} == shapes
    dummy = DummyCheckpoint(shapes, torch.bfloat16)
    assert {name: tuple(dummy.get(name).shape) for name in shapes} == shapes
