"""Settings that a deployment's file, its keywords in Python and an instance have in common, each written once.

    EngineSettings ──▶ hbserve_core.InstanceConfig       inherits them: what one instance runs with
                   ──▶ hbserve.pd_disagg.PdDisaggConfig  inherits them: keywords of whoever starts a deployment
                   ──▶ sections of the YAML file         made of them: `In` names the section of each
    KVTransferSettings ──▶ hbserve_kv.KVTransferConfig, and the YAML section kv_transfer: both inherit them

A new key is one field here, and one entry in docs/configuration.md.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from hbserve_rpc.messages import Role
from hbserve_rpc.misfits import describe_value_misfit
from hbserve_rpc.plain_values import shown

LARGEST = 2.0**62
"""Upper bound of all numeric settings, so that infinity is refused."""
CHUNK_SIZE = 512
ROWS_PER_SEQUENCE = 8
"""Number of rows for each sequence that a CUDA graph for steps with prompts has room for."""


@dataclass(frozen=True)
class Bounds:
    """Range of a number, both ends included. Only integers are allowed if `low` is one; NaN never is."""

    low: float
    high: float = LARGEST

    def allow(self, value: object) -> bool:
        return isinstance(value, int if isinstance(self.low, int) else (int, float)) and self.low <= value <= self.high

    def instead_of(self, value: object) -> str:
        """Say what is expected. LARGEST as the upper end is named only if the value is beyond it."""
        has_end = self.high != LARGEST or (isinstance(value, (int, float)) and value > self.high)
        return f"{self.low} to {int(self.high)}" if has_end else f"at least {self.low}"


@dataclass(frozen=True)
class Form:
    """Form that a text must have, as a regular expression and in words."""

    pattern: str
    words: str

    def allow(self, value: object) -> bool:
        return isinstance(value, str) and re.fullmatch(self.pattern, value) is not None

    def instead_of(self, _: object) -> str:
        return self.words


@dataclass(frozen=True)
class In:
    """Marker of the section of the YAML file that has a setting. Its key there is its name without `<section>_`."""

    section: str


POSITIVE = Bounds(1)
NOT_NEGATIVE = Bounds(0)
PORT = Bounds(0, 65535)
DEVICE = Form(r"auto|cpu(:0)?|cuda(:\d{1,2})?", "'auto', 'cpu' or 'cuda:N'")


class EngineSettings(msgspec.Struct, kw_only=True):
    """Engine settings, which apply unchanged to every instance of a deployment.

    This struct is not frozen, because fields of its subclass PdDisaggConfig may be set. InstanceConfig and the sections
    of the file are frozen.
    """

    tensor_parallel_size: Annotated[int, In("model"), POSITIVE] = 1
    """Number of ranks that the model is split among: one process each, on neighbouring GPUs of a host or on the CPU. It
    must divide the model's heads and the width of its MLP. An instance of a deployment may have its own number."""
    expert_parallel: Annotated[bool, In("model")] = False
    """Whether each rank has some of the model's experts whole. Otherwise it has a part of every expert."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], In("model")] = "auto"
    """Dtype of the model; "auto" takes the checkpoint's."""
    max_model_len: Annotated[int | None, In("model"), POSITIVE] = None
    """Largest number of tokens in a sequence; None takes the model's own limit."""
    load_format: Annotated[Literal["safetensors", "dummy"], In("model")] = "safetensors"
    """Source of the weights. "dummy" needs only config.json and invents them: the same numbers on each instance,
    whatever its device and number of ranks."""

    chunked_prefill_enabled: Annotated[bool, In("chunked_prefill")] = True
    """Whether a prompt is computed in several steps, together with the tokens of other requests."""
    chunk_size: Annotated[int | Literal["auto"] | None, In("chunked_prefill"), POSITIVE] = None
    """Largest number of prompt tokens of one request in one step. "auto" chooses by how long steps take, by a prompt's
    length and by what else waits. None is "auto" or CHUNK_SIZE: see `chunk_size_of`."""
    itl_target_ms: Annotated[float | None, In("chunked_prefill"), Bounds(0.1)] = None
    """Longest time that a step with prompt tokens should take if it also decodes other sequences. None: as long as
    suits prompts. It has an effect only with chunk_size "auto", which it makes the default of all instances."""
    max_chunk_prefill_tokens: Annotated[int, In("chunked_prefill"), POSITIVE] = 4096
    """Largest number of prompt tokens of all requests together in one step."""

    cuda_graph_enabled: Annotated[bool, In("cuda_graph")] = True
    """Whether steps are replayed from CUDA graphs. Has no effect on the CPU."""
    cuda_graph_max_seq_len: Annotated[int, In("cuda_graph"), POSITIVE] = 2048
    """Length in tokens of the longest prompt chunk that runs in a CUDA graph, with decodes beside it."""

    device: Annotated[str, In("engine"), DEVICE] = "auto"
    """Device of an instance: "auto" (CUDA if there is one), "cpu", or "cuda:N"."""
    num_threads: Annotated[int, In("engine"), NOT_NEGATIVE] = 0
    """Number of threads of torch's CPU operators in an instance, all its ranks together. 0: the instances of a
    deployment divide their host's cores among them, and an engine on its own keeps torch's default."""
    block_size: Annotated[int, In("engine"), POSITIVE] = 16
    """Tokens per KV block."""
    kv_cache_dtype: Annotated[Literal["auto", "fp8"], In("engine")] = "auto"
    """Dtype of keys and values: "auto" is the model's; "fp8" is 8-bit floats (e4m3), with the checkpoint's scales for
    them, or 1 if it has none. Instances that send KV to each other must have the same."""
    widen_weights: Annotated[bool, In("engine")] = False
    """Whether CUDA keeps quantised weights in the model's dtype, as the CPU does, instead of as narrow as stored."""
    keep_activations: Annotated[bool, In("engine")] = False
    """Whether CUDA keeps activations in the model's dtype even when it multiplies more than 64 rows with 8-bit weights.
    Prefill is then slower, but its activations are not rounded to 8 bits."""
    num_blocks: Annotated[int | None, In("engine"), POSITIVE] = None
    """Number of KV blocks in each instance's pool; None sizes the pool from free memory."""
    gpu_memory_utilization: Annotated[float, In("engine"), Bounds(0.01, 1)] = 0.9
    """Fraction of a GPU's memory that all instances on it take together."""
    max_num_seqs: Annotated[int, In("engine"), POSITIVE] = 256
    """Largest number of sequences in one step of an instance."""
    max_num_batched_tokens: Annotated[int, In("engine"), POSITIVE] = 2048
    """Largest number of tokens in one step of an instance."""
    health_port: Annotated[int | None, In("engine"), PORT] = None
    """HTTP port for /health, /ready and /metrics: an instance with kv_rank r listens at this port + r. 0 lets the OS
    choose; None opens no such port."""
    prefix_caching: Annotated[bool, In("engine")] = True
    """Whether the KV of finished requests is kept for prompts that begin in the same way."""

    @property
    def most_graph_tokens(self) -> int:
        """Largest number of tokens in a step with prompts that has a CUDA graph: the longest chunk, and as many decodes
        beside it as the graph has room for. 0 without graphs."""
        longest = self.cuda_graph_max_seq_len if self.cuda_graph_enabled else 0
        return min(longest + min(self.max_num_seqs, longest // ROWS_PER_SEQUENCE), self.max_num_batched_tokens)


def chunk_size_of(
    chunk_size: int | Literal["auto"] | None, role: Role, itl_target_ms: float | None
) -> int | Literal["auto"]:
    """Return the chunk size of an instance. None becomes "auto" on prefill instances, and on all others if
    `itl_target_ms` limits how long decoding sequences wait for a chunk; otherwise it becomes CHUNK_SIZE."""
    return chunk_size or ("auto" if role == "prefill" or itl_target_ms is not None else CHUNK_SIZE)


class KVTransferSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of KV transfers, which apply unchanged to every instance of a deployment."""

    backend: str = "nccl"
    """Way in which KV moves: nccl, mooncake, ipc, auto, the name of an entry point in the group `hbserve_kv.backends`,
    or `module:Class`."""
    buffer_size: int = 1 << 30
    """Size in bytes of each instance's lookup buffer, which holds transfers that nobody has asked for yet. Its memory
    is touched only as it is used."""
    timeout_s: Annotated[float, Bounds(0.1)] = 30.0
    """Time of silence after which a peer counts as failed."""
    checksum: bool = False
    """Whether a receiver verifies a checksum of each block. KV that was corrupted on its way fails its transfer, and is
    computed again."""
    options: dict[str, Any] = {}
    """Options that are passed to a custom backend."""


def out_of_bounds(settings: object) -> Iterator[tuple[str, object, Bounds | Form]]:
    """Yield the name, value, and bounds or form of each field whose bounds or form do not allow its value."""
    for name, (bounds, others) in _bounded_fields(type(settings)).items():
        value = getattr(settings, name)
        if not bounds.allow(value) and value not in others:
            yield name, value, bounds


def misfits(settings: object) -> Iterator[tuple[str, str]]:
    """Yield the name of each field whose value has the wrong type or is out of bounds, and one line that says so.

    It is for dataclasses, and for the `__post_init__` of structs: msgspec checks nothing when one is made in Python,
    and its decoders call `__post_init__` too.
    """
    for name, kind in _field_types(type(settings)).items():
        value = getattr(settings, name)
        try:
            found = msgspec.convert(str(value) if isinstance(value, str) else value, kind)
            _require_as_it_is(found, value)
        except msgspec.ValidationError as error:
            yield name, describe_value_misfit(error, name, value, kind)
            return
    for name, value, bounds in out_of_bounds(settings):
        yield name, f"{name}={shown(value)}: expected {bounds.instead_of(value)}"


def _require_as_it_is(found: object, value: object) -> None:
    """Raise ValidationError if msgspec made a struct or a dataclass of something else, such as a dict."""
    if (isinstance(found, msgspec.Struct) or is_dataclass(found)) and found is not value:
        raise msgspec.ValidationError(f"Expected `{type(found).__name__}`, got `{type(value).__name__}`")
    if isinstance(found, (list, tuple)) and isinstance(value, (list, tuple)):
        for each, given in zip(found, value, strict=True):
            _require_as_it_is(each, given)


def _field_types(kind: type[Any]) -> dict[str, Any]:
    if is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        return {field.name: hints[field.name] for field in fields(kind)}
    return {field.name: field.type for field in msgspec.structs.fields(kind)}


def _bounded_fields(struct: type[Any]) -> dict[str, tuple[Bounds | Form, tuple[object, ...]]]:
    """Return the bounds or form of each field that has one, and the other values that it may have, such as None."""
    return {
        name: (bounds, tuple(_no_numbers(get_args(kind)[0])))
        for name, kind in _field_types(struct).items()
        for bounds in _metadata(kind, Bounds) + _metadata(kind, Form)
    }


def _no_numbers(kind: Any) -> Iterator[object]:
    for choice in get_args(kind):
        if choice is NoneType:
            yield None
        elif get_origin(choice) is Literal:
            yield from get_args(choice)


def _metadata(annotated: Any, kind: type[Any]) -> list[Any]:
    return [each for each in getattr(annotated, "__metadata__", ()) if isinstance(each, kind)]


def _key(name: str, annotated: Any) -> tuple[str, str]:
    (place,) = _metadata(annotated, In)
    return place.section, name.removeprefix(f"{place.section}_")


ENGINE_KEYS: dict[str, tuple[str, str]] = {
    field.name: _key(field.name, field.type) for field in msgspec.structs.fields(EngineSettings)
}
"""Section of the YAML file and key there, by field of EngineSettings."""
