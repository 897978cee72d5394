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
"""Of all numbers that can be set. Infinity is beyond it."""
CHUNK_SIZE = 512
ROWS_PER_SEQUENCE = 8
"""Of a CUDA graph for steps with prompts: it has room for a sequence in so many rows."""


@dataclass(frozen=True)
class Bounds:
    """Range of a number, both ends included: of integers if `low` is one. NaN is in none."""

    low: float
    high: float = LARGEST

    def allow(self, value: object) -> bool:
        return isinstance(value, int if isinstance(self.low, int) else (int, float)) and self.low <= value <= self.high

    def instead_of(self, value: object) -> str:
        """What is expected, in words. That numbers end somewhere is said only of one that is beyond."""
        has_end = self.high != LARGEST or (isinstance(value, (int, float)) and value > self.high)
        return f"{self.low} to {int(self.high)}" if has_end else f"at least {self.low}"


@dataclass(frozen=True)
class Form:
    """What a text may be, as a regular expression, and in words."""

    pattern: str
    words: str

    def allow(self, value: object) -> bool:
        return isinstance(value, str) and re.fullmatch(self.pattern, value) is not None

    def instead_of(self, _: object) -> str:
        return self.words


@dataclass(frozen=True)
class In:
    """Section of the YAML file that a setting is in, under its own name less a leading `<section>_`."""

    section: str


POSITIVE = Bounds(1)
NOT_NEGATIVE = Bounds(0)
PORT = Bounds(0, 65535)
DEVICE = Form(r"auto|cpu(:0)?|cuda(:\d{1,2})?", "'auto', 'cpu' or 'cuda:N'")


class EngineSettings(msgspec.Struct, kw_only=True):
    """Settings that every instance of a deployment takes as they are.

    Not frozen, because PdDisaggConfig's fields may be set; InstanceConfig and the sections of the file are.
    """

    tensor_parallel_size: Annotated[int, In("model"), POSITIVE] = 1
    """Ranks that the model is split among: one process each, on neighbouring GPUs of a host, or on the CPU. The model's
    heads and MLP must be divisible by it. An instance of a deployment may say another number itself."""
    expert_parallel: Annotated[bool, In("model")] = False
    """Each rank has some of a model's experts whole. Otherwise it has its part of every expert."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], In("model")] = "auto"
    """"auto" takes the checkpoint's."""
    max_model_len: Annotated[int | None, In("model"), POSITIVE] = None
    """Most tokens of a sequence; None takes the model's own limit."""
    load_format: Annotated[Literal["safetensors", "dummy"], In("model")] = "safetensors"
    """"dummy" needs only config.json and invents the weights: the same numbers on each instance, whatever its device
    and number of ranks."""

    chunked_prefill_enabled: Annotated[bool, In("chunked_prefill")] = True
    """Compute a prompt in several steps, together with the tokens of other requests."""
    chunk_size: Annotated[int | Literal["auto"] | None, In("chunked_prefill"), POSITIVE] = None
    """Most prompt tokens of one request in one step. "auto" chooses by how long steps take, by a prompt's length and by
    what else waits. None: as `chunk_size_of` has it for the instance's role."""
    itl_target_ms: Annotated[float | None, In("chunked_prefill"), Bounds(0.1)] = None
    """With chunk_size "auto", which it makes the default of all instances: a step with prompt tokens is to take no
    longer than this where sequences decode beside them. None: as long as suits prompts."""
    max_chunk_prefill_tokens: Annotated[int, In("chunked_prefill"), POSITIVE] = 4096
    """Most prompt tokens of all requests together in one step."""

    cuda_graph_enabled: Annotated[bool, In("cuda_graph")] = True
    """Replay steps from CUDA graphs; on the CPU without effect."""
    cuda_graph_max_seq_len: Annotated[int, In("cuda_graph"), POSITIVE] = 2048
    """Longest prompt chunk that runs in a graph, with decodes beside it."""

    device: Annotated[str, In("engine"), DEVICE] = "auto"
    """"auto" (CUDA if there is one), "cpu", or "cuda:N"."""
    num_threads: Annotated[int, In("engine"), NOT_NEGATIVE] = 0
    """Threads of torch's CPU operators in an instance, of all its ranks together. 0: the instances of a deployment
    share their host's cores, and an engine alone leaves torch's choice."""
    block_size: Annotated[int, In("engine"), POSITIVE] = 16
    """Tokens per KV block."""
    kv_cache_dtype: Annotated[Literal["auto", "fp8"], In("engine")] = "auto"
    """"auto" keeps keys and values in the model's dtype; "fp8" in 8-bit floats (e4m3), by the scales that a checkpoint
    has for them, or 1. Instances that send KV to each other must have the same."""
    widen_weights: Annotated[bool, In("engine")] = False
    """On CUDA, keep quantised weights in the model's dtype, as on the CPU, and not as narrow as they are stored."""
    keep_activations: Annotated[bool, In("engine")] = False
    """On CUDA, more than 64 rows too are multiplied with 8-bit weights in the model's dtype: prefill is slower then,
    and not rounded to 8 bits."""
    num_blocks: Annotated[int | None, In("engine"), POSITIVE] = None
    """KV blocks in each instance's pool; None sizes the pool from free memory."""
    gpu_memory_utilization: Annotated[float, In("engine"), Bounds(0.01, 1)] = 0.9
    """Fraction of a GPU's memory that all instances on it take together."""
    max_num_seqs: Annotated[int, In("engine"), POSITIVE] = 256
    """Most sequences in one step of an instance."""
    max_num_batched_tokens: Annotated[int, In("engine"), POSITIVE] = 2048
    """Most tokens in one step of an instance."""
    health_port: Annotated[int | None, In("engine"), PORT] = None
    """HTTP port for /health, /ready and /metrics: an instance with kv_rank r listens at it + r; 0 lets the OS choose,
    and None is none."""
    prefix_caching: Annotated[bool, In("engine")] = True
    """Keep the KV of prompts that have ended, for others that begin in the same way."""

    @property
    def most_graph_tokens(self) -> int:
        """Of a step with prompts that has a CUDA graph: those of the longest chunk and of as many decodes beside it as
        the graph has room for. 0 without graphs."""
        longest = self.cuda_graph_max_seq_len if self.cuda_graph_enabled else 0
        return min(longest + min(self.max_num_seqs, longest // ROWS_PER_SEQUENCE), self.max_num_batched_tokens)


def chunk_size_of(
    chunk_size: int | Literal["auto"] | None, role: Role, itl_target_ms: float | None
) -> int | Literal["auto"]:
    """What the setting means for an instance: where nobody has chosen, "auto" on those that only compute prompts, and
    where a target says how long those who decode beside them wait for a chunk; elsewhere CHUNK_SIZE."""
    return chunk_size or ("auto" if role == "prefill" or itl_target_ms is not None else CHUNK_SIZE)


class KVTransferSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of KV transfers that every instance of a deployment takes as they are."""

    backend: str = "nccl"
    """nccl, mooncake, ipc, auto, the name of an entry point in the group `hbserve_kv.backends`, or `module:Class`."""
    buffer_size: int = 1 << 30
    """Bytes of each instance's lookup buffer, where transfers wait that nobody has asked for yet. Touched as it is
    used."""
    timeout_s: Annotated[float, Bounds(0.1)] = 30.0
    """A peer that is silent for so long has failed."""
    checksum: bool = False
    """As a receiver, verify a checksum of each block: KV that was corrupted on its way fails its transfer, and is
    computed again."""
    options: dict[str, Any] = {}
    """Handed to a custom backend."""


def out_of_bounds(settings: object) -> Iterator[tuple[str, object, Bounds | Form]]:
    """Name, value and bounds, or form, of each field that has some and whose value is not allowed."""
    for name, (bounds, others) in _bounded_fields(type(settings)).items():
        value = getattr(settings, name)
        if not bounds.allow(value) and value not in others:
            yield name, value, bounds


def misfits(settings: object) -> Iterator[tuple[str, str]]:
    """Name of each field that cannot be what it is, and one line that says so: of another type, or out of its bounds.

    For structs that are made in Python, of which msgspec checks nothing, and by its decoders, which call the same; and
    for dataclasses.
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
    """Raises ValidationError: a struct or a dataclass was made of what is none."""
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
    """Bounds, or the form, of each field that has some, and what it may be besides."""
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
"""Field of EngineSettings: its section of the YAML file, and its key there."""
