"""Loading weights: what is wrong with a folder is said at once and completely; invented ones are the same anywhere."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hbserve_core_quantised import quantised
from safetensors.torch import load_file, save_file

from hbserve_core.config import InstanceConfig
from hbserve_core.errors import ModelFilesMissing, WeightsMismatch
from hbserve_core.model.checkpoint.checkpoint import Checkpoint, with_stored_head
from hbserve_core.model.checkpoint.dummy_checkpoint import DummyCheckpoint
from hbserve_core.model.checkpoint.safetensors_file import SafetensorsFile
from hbserve_core.model.checkpoint.tensor_source import TensorPart, sampled_places, weights_digest
from hbserve_core.model.checkpoint_shapes import checkpoint_shapes
from hbserve_core.model.layers import Linear
from hbserve_core.model.model_config import load_model_config
from hbserve_core.model.quantization import Packing
from hbserve_core.model.shard import Shard
from hbserve_core.model.weights import load_weights
from hbserve_core.torch_runner.runner import ModelRunner
from hbserve_testing.narrowing import present

CPU = torch.device("cpu")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


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


def test_an_adapter_beside_a_models_config_is_called_one(copy_of):
    folder = copy_of("qwen3")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelFilesMissing, match="a LoRA adapter must be merged into its model first"):
        load(folder)


def test_an_adapter_beside_whole_weights_is_told_not_to_be_applied(copy_of, caplog):
    """transformers applies it, where peft is installed."""
    folder = copy_of("qwen3")
    load(folder)
    assert not caplog.records
    (folder / "adapter_config.json").write_text("{}")
    load(folder)
    assert [each.getMessage() for each in caplog.records] == [
        f"{folder}: the adapter beside the weights is not applied: merge it into them (peft: merge_and_unload(), then "
        "save_pretrained), or take adapter_config.json away"
    ]


def test_matrices_without_columns_are_named(copy_of):
    """The two that may be one are compared before shapes are looked at."""
    folder = copy_of("qwen2")
    rewrite(folder, lambda tensors: tensors.update({EMBEDDING: torch.zeros(9, 0), HEAD: torch.zeros(9, 0)}))
    with pytest.raises(WeightsMismatch, match=r"embed_tokens.weight has shape \(9, 0\), config.json asks for"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["qwen2", "qwen2-sharded"])
def test_a_dtype_that_the_config_does_not_say_is_that_of_the_files_as_in_transformers(copy_of, dtype, name):
    folder = copy_of(name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": None}))
    computed_in = torch.float32 if dtype == torch.float64 else dtype

    def begin_files_with(first: dict[str, torch.Tensor]) -> None:
        for path in folder.glob("*.safetensors"):
            weights = {name: each.to(dtype) for name, each in load_file(path).items() if each.is_floating_point()}
            save_file(first | weights, path, {"format": "pt"})

    integers = {"b": torch.zeros(4, dtype=torch.int32)}
    begin_files_with(integers)
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).dtype == dtype
    assert load_model_config(folder).dtype == computed_in
    # Nor does what is narrower than 16 bits say anything of it. transformers 4 cannot read such a file.
    begin_files_with({"a": torch.zeros(4, dtype=torch.float8_e4m3fn)} | integers)
    assert load_model_config(folder).dtype == computed_in
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert load_model_config(folder).dtype == torch.float32, "invented weights need no files"


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
    # Copies: those that are read lie in the file that is written twice.
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
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
    del tensors[EMBEDDING]
    save_file(tensors | {f"other.{i}": torch.zeros(1) for i in range(20)}, folder / "model.safetensors")
    with pytest.raises(WeightsMismatch, match=rf"missing: {EMBEDDING};.*; unexpected: other\.\d+ … and 12 more$"):
        load(folder)  # its head is not the embedding, as that of a tied model may be


def test_a_file_that_cannot_be_read_is_named(copy_of):
    folder = copy_of("llama")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(WeightsMismatch, match=r"model\.safetensors cannot be read"):
        load(folder)


@pytest.mark.parametrize("content", ["[]", '{"weight_map": {"model.norm.weight": 3}}', "[" * 100_000])
def test_an_index_without_a_weight_map_is_named(copy_of, content):
    folder = copy_of("qwen2-sharded")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(WeightsMismatch, match=r"index\.json has no readable weight_map"):
        load(folder)


@pytest.mark.parametrize("outside", ["../llama/model.safetensors", "/dev/zero", "a/../../x.safetensors"])
def test_an_index_that_names_a_file_outside_of_its_folder_is_refused_by_that_name(copy_of, outside):
    folder = copy_of("qwen2-sharded")
    copy_of("llama")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {"model.norm.weight": outside}}))
    with pytest.raises(WeightsMismatch, match=rf"weight_map names '{re.escape(outside)}', which is outside"):
        load(folder)


def rewrite(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tied_model_that_stores_its_head_too_has_it_once(copy_of, model_folder, dtype):
    folder = copy_of("qwen2")
    rewrite(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].to(dtype, copy=True)}))
    assert load(folder).digest == load(model_folder("qwen2")).digest
    assert HEAD not in checkpoint_shapes(with_stored_head(load_model_config(folder)))


def test_a_tied_model_that_stores_only_its_head_is_the_same_model(copy_of, model_folder):
    folder = copy_of("qwen3")
    rewrite(folder, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    assert load(folder).digest == load(model_folder("qwen3")).digest


def test_a_model_that_is_called_tied_and_has_another_head_uses_it_as_transformers_does(
    copy_of, caplog, stepper, prompt
):
    # Known elsewhere: vLLM #51665.
    folder = copy_of("qwen3")
    rewrite(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].flip(0).contiguous()}))
    runner = ModelRunner(InstanceConfig(model_path=str(folder), block_size=8, num_blocks=32, device="cpu"))
    assert "different numbers" in caplog.text
    stepping = stepper(runner)
    sequence = stepping.sequence(prompt(20))
    stepping.generate([sequence], 6, 24)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = theirs.generate(torch.tensor([prompt(20)]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert sequence.output_token_ids == expected[0, 20:].tolist()


@pytest.mark.parametrize("name", ["qwen3", "opt", "llama"])
def test_tensors_without_the_prefix_are_the_same_model(copy_of, model_folder, name):
    folder = copy_of(name)
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors")
    assert load(folder).digest == load(model_folder(name)).digest


def test_one_number_that_differs_at_the_end_is_another_head(copy_of, monkeypatch):
    monkeypatch.setattr("hbserve_core.model.checkpoint.checkpoint._PIECE_BYTES", 4096)
    folder = copy_of("qwen3")

    def differ(tensors):
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD][-1, -1] += 1

    rewrite(folder, differ)
    assert not with_stored_head(load_model_config(folder)).tied_embeddings


@pytest.mark.parametrize("wrong", [torch.ones(64), torch.ones(320, 64, dtype=torch.int8)])
def test_a_tied_model_whose_tables_are_none_is_refused_by_the_name_of_one(copy_of, wrong):
    folder = copy_of("qwen3")
    rewrite(folder, lambda tensors: tensors.update({HEAD: wrong, EMBEDDING: wrong.clone()}))
    assert not with_stored_head(load_model_config(folder)).tied_embeddings, "they are not compared"
    with pytest.raises(WeightsMismatch, match=f"{EMBEDDING} has "):
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


def test_a_whole_file_is_preferred_to_an_index_beside_it(copy_of):
    """As transformers does it: whoever exports a model again as one file may leave the old index behind."""
    folder = copy_of("llama")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "gone.safetensors"}}')
    load(folder)


def test_a_tensor_of_integers_is_refused(copy_of):
    file = copy_of("llama") / "model.safetensors"
    save_file(load_file(file) | {"model.norm.weight": torch.ones(64, dtype=torch.int8)}, file)
    with pytest.raises(WeightsMismatch, match=r"model\.norm\.weight has dtype I8, expected one of F64, F32, F16, BF16"):
        load(file.parent)


def test_a_file_that_is_cut_off_while_it_is_read_is_named(copy_of):
    file = copy_of("llama") / "model.safetensors"
    config = load_model_config(file.parent)
    shapes = checkpoint_shapes(config)
    with contextlib.closing(Checkpoint(config, shapes, CPU)) as checkpoint:
        os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(WeightsMismatch, match=r"model\.safetensors was cut off while it was read"):
            [read(checkpoint, TensorPart(name), shape) for name, shape in shapes.items()]


@pytest.mark.parametrize("broken", [False, True])
def test_files_and_threads_are_gone_when_weights_are_loaded(copy_of, broken):
    folder = copy_of("qwen2-sharded")
    if broken:
        (folder / "model-00006-of-00006.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with contextlib.suppress(WeightsMismatch):
        load(folder)
    assert not [link for link in Path("/proc/self/fd").iterdir() if str(folder) in os.path.realpath(link)]
    assert not [thread.name for thread in threading.enumerate() if "weights" in thread.name]


def read(source, part, shape, dtype=torch.float32, device=CPU):
    target = torch.full(part.shape(shape), float("nan"), dtype=dtype, device=device)
    source.read([part], target)
    return target


PARTS = [
    *((rows, slice(None)) for rows in (slice(None), slice(0, 32), slice(31, 32), slice(60, 90), slice(64, 90))),
    *((slice(None), columns) for columns in (slice(0, 32), slice(32, 64), slice(63, 90))),
    (slice(3, 17), slice(5, 6)),
]


@pytest.mark.parametrize("short_gap", [32 << 10, 0])
@pytest.mark.parametrize("piece_bytes", [4 << 20, 512])
@pytest.mark.parametrize("name", ["qwen2-sharded", "llama"])
def test_what_is_read_is_what_the_files_hold(model_folder, monkeypatch, name, piece_bytes, short_gap):
    monkeypatch.setattr("hbserve_core.model.checkpoint.staged_reader._PIECE_BYTES", piece_bytes)
    monkeypatch.setattr("hbserve_core.model.checkpoint.staged_reader._SHORT_GAP", short_gap)
    config = load_model_config(model_folder(name))
    shapes = checkpoint_shapes(config)
    tensors: dict[str, torch.Tensor] = {}
    for file in Path(config.path).glob("*.safetensors"):
        tensors |= load_file(file)
    with contextlib.closing(Checkpoint(config, shapes, CPU)) as checkpoint:
        for each, shape in shapes.items():
            assert torch.equal(read(checkpoint, TensorPart(each), shape), tensors[each])
            assert torch.equal(checkpoint.sample(each, 64), tensors[each].flatten()[list(sampled_places(shape, 64))])
        projection = "model.layers.1.self_attn.q_proj.weight"
        for rows, columns in PARTS:
            found = read(checkpoint, TensorPart(projection, rows, columns), shapes[projection])
            assert torch.equal(found, tensors[projection][rows, columns])


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_weights_are_rounded_once_to_the_dtype_of_the_engine(copy_of, monkeypatch, stored, device):
    monkeypatch.setattr(
        "hbserve_core.model.checkpoint.staged_reader._PIECE_BYTES", 1024
    )  # many pieces, for all threads
    file = copy_of("llama") / "model.safetensors"
    # Copies: what load_file gives may be a view of the file, which is written anew here.
    tensors = {name: tensor.to(stored, copy=True) for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    config = load_model_config(file.parent)
    shapes = checkpoint_shapes(config)
    with contextlib.closing(Checkpoint(config, shapes, torch.device(device))) as checkpoint:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for name, shape in shapes.items():
                found = read(checkpoint, TensorPart(name), shape, dtype, device)
                assert torch.equal(found.cpu(), tensors[name].to(dtype))


def test_weights_may_be_loaded_in_inference_mode(model_folder):
    with torch.inference_mode():
        load(model_folder("llama"))


# ---- load_format "dummy" ---------------------------------------------------------------------------------------------

SHAPES = {
    "a.weight": (300, 700), "b.weight": (300, 700), "norm.weight": (700,), "a.bias": (300,), "norm.bias": (700,),
    "vast.weight": (1 << 33, 8),
}  # fmt: skip


def dummy(name="a.weight", dtype=torch.float32, **part):
    return read(DummyCheckpoint(SHAPES), TensorPart(name, **part), SHAPES[name], dtype)


def test_dummy_weights_are_these_numbers_for_ever():
    """Instances of two versions may serve one deployment, and measurements are compared."""
    sums = dummy(rows=slice(298, None), columns=slice(697, None)) / 0.02 * (4 * (256**2 - 1) / 12) ** 0.5 + 510
    assert sums.round().int().tolist() == [[585, 483, 527], [230, 600, 473]]


def test_dummy_weights_are_the_published_hash_of_their_place():
    """Beside plain Python, whose integers have no sign to shift in and do not wrap."""
    digest = hashlib.sha256(b"a.weight").digest()
    first, second = int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")
    found = dummy().flatten()
    for place in (0, 1, 699, 700, 123_456, 209_999):
        x = (place + first) % 2**32
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32 ^ second
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        x ^= x >> 16
        number = np.float32(sum(x.to_bytes(4, "big")) - 510) * np.float32(0.02 / 21845**0.5)
        assert found[place].item() == number


def test_dummy_weights_are_about_normal_in_every_row_and_column():
    found = dummy()
    assert found.mean().item() == pytest.approx(0, abs=2e-4)
    assert found.std().item() == pytest.approx(0.02, rel=0.01)
    assert (found.abs() < 0.02).float().mean().item() == pytest.approx(0.683, abs=0.02)
    assert (found.abs() < 0.04).float().mean().item() == pytest.approx(0.955, abs=0.01)
    for over in (0, 1):
        assert found.mean(over).abs().max() < 0.02 / found.shape[over] ** 0.5 * 5
        assert found.std(over).sub(0.02).abs().max() < 0.02 / (2 * found.shape[over]) ** 0.5 * 5
    # No direction is preferred: the largest singular value is that of a matrix of independent numbers.
    assert torch.linalg.matrix_norm(found, 2).item() == pytest.approx(0.02 * (300**0.5 + 700**0.5), rel=0.05)


def test_dummy_weights_of_different_names_have_nothing_in_common():
    one, other = dummy("a.weight").flatten(), dummy("b.weight").flatten()
    assert abs(torch.corrcoef(torch.stack((one, other)))[0, 1].item()) < 5 / len(one) ** 0.5
    # Nor in another order.
    runs = one.unfold(0, 4, 1)
    assert not (runs == other[:4]).all(1).any()


def test_dummy_norms_are_one_and_biases_zero():
    assert dummy("norm.weight").unique().tolist() == [1]
    assert dummy("a.bias").unique().tolist() == dummy("norm.bias").unique().tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dummy_weights_of_16_bits_are_those_of_32_rounded(dtype):
    assert torch.equal(dummy(dtype=dtype), dummy().to(dtype))


@pytest.mark.parametrize("rows", [slice(None), slice(0, 100), slice(100, 101), slice(299, 400), slice(300, 400)])
@pytest.mark.parametrize("columns", [slice(None), slice(350, 700), slice(3, 4)])
def test_a_part_of_dummy_weights_is_that_part_of_the_whole(rows, columns):
    assert torch.equal(dummy(rows=rows, columns=columns), dummy()[rows, columns])


def test_dummy_weights_do_not_depend_on_how_many_are_made_at_once(monkeypatch):
    expected = dummy()
    monkeypatch.setattr("hbserve_core.model.checkpoint.dummy_checkpoint._CPU_PIECE", 701)
    assert torch.equal(dummy(), expected)


def test_dummy_weights_repeat_after_2_to_the_32():
    one, other = (dummy("vast.weight", rows=slice(first, first + 9)) for first in (5, 5 + (1 << 29)))
    assert torch.equal(one, other)
    assert not torch.equal(one, dummy("vast.weight", rows=slice(5 + (1 << 28), 14 + (1 << 28))))


def test_a_sample_of_dummy_weights_is_of_what_is_read():
    for name in ("a.weight", "norm.weight", "a.bias"):
        found = DummyCheckpoint(SHAPES).sample(name, 7)
        assert torch.equal(found, dummy(name).flatten()[list(sampled_places(SHAPES[name], 7))])


@pytest.mark.parametrize(("num_tensors", "expected"), [(20, 64), (2048, 64), (18_432, 7), (100_000, 4)])
def test_a_digest_reads_few_numbers_of_many_tensors(num_tensors, expected):
    """Each of them takes a system call."""
    counts = set()

    class Source(DummyCheckpoint):
        def sample(self, name, count):
            counts.add(count)
            return torch.zeros(1)

    shapes = {f"{number}.weight": (8, 8) for number in range(num_tensors)}
    weights_digest(Source(shapes), shapes)
    assert counts == {expected}


def test_neighbours_are_picked_by_one_read(model_folder, monkeypatch):
    (path,) = model_folder("llama").glob("*.safetensors")
    file, reads = SafetensorsFile(path), []
    whole = file.tensors["model.layers.0.self_attn.q_proj.weight"].whole()
    read = file.read

    def noted(offset, buffer):
        reads.append(len(buffer))
        read(offset, buffer)

    monkeypatch.setattr(file, "read", noted)
    found = file.tensors["model.layers.0.self_attn.q_proj.weight"].pick(range(5, 37))
    file.close()
    assert torch.equal(found, whole.flatten()[5:37])
    assert reads == [32 * whole.itemsize]


QUANTISED: list[dict[str, Any]] = [
    {"scale_block": (128, 128)}, {"scale_block": (128, 4096)}, {"packing": Packing("awq", 32, 0)},
    {"packing": Packing("gptq", -1, 1)},
]  # fmt: skip
LAYER = {"model.layers.0.mlp.up_proj.weight": (70, 256), "model.layers.0.mlp.gate.weight": (8, 256)}


@pytest.mark.parametrize("quantised", QUANTISED, ids=str)
@pytest.mark.parametrize("part", [{}, {"rows": slice(3, 40)}, {"columns": slice(128, 256)}], ids=str)
def test_dummy_weights_of_a_quantised_model_are_what_it_has_numbers_for(quantised, part):
    """As they stay narrow, and as they are widened; about the same as those of the model in more bits."""
    source, plain = DummyCheckpoint(LAYER, **quantised), DummyCheckpoint(LAYER)
    projection, router = (TensorPart(name, **part) for name in LAYER)
    wide = read(source, projection, LAYER[projection.name], torch.float32)
    narrow = present(source.read_narrow([projection], torch.device("cpu")))
    assert torch.equal(narrow.widened(), wide)
    assert narrow.nbytes < (1.1 if "scale_block" in quantised else 0.7) * wide.numel()
    exact = read(plain, projection, LAYER[projection.name], torch.float32)
    assert 0 < (wide - exact).norm() < (0.04 if "scale_block" in quantised else 0.12) * exact.norm()
    assert source.read_narrow([router], torch.device("cpu")) is None
    assert plain.read_narrow([projection], torch.device("cpu")) is None


@pytest.mark.parametrize("quantised", QUANTISED, ids=str)
def test_a_sample_of_quantised_dummy_weights_is_of_what_is_read(quantised):
    source = DummyCheckpoint(LAYER, **quantised)
    for name, shape in LAYER.items():
        whole = read(source, TensorPart(name), shape, torch.float32).flatten()
        assert torch.equal(source.sample(name, 64), whole[list(sampled_places(shape, 64))])


@pytest.mark.gpu
@pytest.mark.parametrize("quantised", QUANTISED, ids=str)
def test_quantised_dummy_weights_are_the_same_on_the_gpu(quantised):
    source = DummyCheckpoint(LAYER, **quantised)
    one, other = (
        present(source.read_narrow([TensorPart(next(iter(LAYER)))], torch.device(device))) for device in ("cpu", "cuda")
    )
    assert torch.equal(one.values.view(torch.uint8), other.values.view(torch.uint8).cpu())
    assert torch.equal(one.widened(), other.widened().cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dummy_weights_are_the_same_on_the_gpu(dtype):
    for part in (TensorPart("a.weight"), TensorPart("a.weight", slice(7, 200), slice(350, 700))):
        expected = read(DummyCheckpoint(SHAPES), part, SHAPES[part.name], dtype)
        found = torch.empty_like(expected, device="cuda")
        DummyCheckpoint(SHAPES).read([part], found)
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("load_format", ["safetensors", "dummy"])
@pytest.mark.parametrize("size", [2, 4])
def test_weights_are_the_same_on_every_rank_count(model_folder, monkeypatch, load_format, size):
    monkeypatch.setattr("hbserve_core.model.weights.make_linear", Linear)  # as they are, not packed
    config = load_model_config(model_folder("llama"))
    whole = load_weights(config, load_format, torch.float32, CPU)
    ranks = [load_weights(config, load_format, torch.float32, CPU, Shard(rank, size)) for rank in range(size)]
    assert {rank.digest for rank in ranks} == {whole.digest}
    assert torch.equal(torch.cat([rank.embedding for rank in ranks]), whole.embedding)
    for layer, expected in enumerate(whole.layers):
        parts = [rank.layers[layer] for rank in ranks]
        downs = [present(part.down).weight for part in parts]
        assert torch.equal(torch.cat(downs, dim=1), present(expected.down).weight)
        gates = [present(part.gate_up).weight.chunk(2)[0] for part in parts]
        assert torch.equal(torch.cat(gates), present(expected.gate_up).weight.chunk(2)[0])


@pytest.mark.parametrize(
    ("name", "block", "as_compressed_tensors"), [("qwen3-moe", [24, 40], False), ("llama", None, True)]
)
def test_8_bit_weights_are_widened_by_their_scales_whole_and_in_parts_and_said_once(
    copy_of, tmp_path, name, block, as_compressed_tensors, caplog
):
    folder = copy_of(name)
    plain = shutil.copytree(folder, tmp_path / "plain")
    save_file(quantised(folder, block, as_compressed_tensors), plain / "model.safetensors", {"format": "pt"})
    for rank in range(2):
        shard = Shard(rank, 2)
        loaded, expected = (
            load_weights(load_model_config(each), "safetensors", torch.float32, CPU, shard) for each in (folder, plain)
        )
        assert loaded.digest != expected.digest
        for ours, theirs in zip(loaded.layers, expected.layers, strict=True):
            for part in ("qkv", "output", "gate_up", "down"):
                mine, other = getattr(ours, part), getattr(theirs, part)
                if mine is not None:
                    assert torch.equal(mine.weight.to_dense(), other.weight.to_dense())
            if ours.experts:
                assert theirs.experts is not None
                assert torch.equal(ours.experts.gate_up, theirs.experts.gate_up)
                assert torch.equal(ours.experts.down, theirs.experts.down)
    assert caplog.text.count("weights are 8-bit floats") == 2, "once for each rank that has loaded them"


def test_8_bit_weights_give_the_tokens_of_transformers_which_widens_them_too(copy_of, prompt, stepper):
    folder = copy_of("llama")
    quantised(folder, [32, 32], False)
    widened = transformers.FineGrainedFP8Config(weight_block_size=(32, 32), dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=widened
    ).eval()
    given = torch.tensor([prompt(30)])
    expected = theirs.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=6,
                               min_new_tokens=6, eos_token_id=None, pad_token_id=0)  # fmt: skip
    stepping = stepper(ModelRunner(InstanceConfig(model_path=str(folder), num_blocks=16, device="cpu")))
    sequence = stepping.sequence(prompt(30))
    stepping.generate([sequence], 6)
    assert sequence.output_token_ids == expected[0, 30:].tolist()


@pytest.mark.parametrize("shape", [(), (64,), (1, 64, 64), (0, 64)])
def test_8_bit_weights_that_are_no_matrices_are_named(copy_of, shape):
    folder = copy_of("llama")
    quantised(folder, [32, 32], False)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    changed = {**tensors, name: torch.zeros(shape, dtype=torch.float8_e4m3fn)}
    save_file({k: v.clone() for k, v in changed.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsMismatch, match=re.escape(f"{name} of shape {shape} has scales of shape (2, 2)")):
        load(folder)


def test_scales_that_are_missing_or_of_other_blocks_are_named(copy_of):
    folder = copy_of("llama")
    quantised(folder, [32, 32], False)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [16, 16]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        WeightsMismatch, match=r"q_proj.weight of shape .64, 64. has scales of shape .2, 2., for blocks"
    ):
        load(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "scale" not in k}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsMismatch, match=r"q_proj.weight has dtype F8_E4M3 and no scales"):
        load(folder)
