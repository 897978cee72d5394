"""Triton's interpreter without what it does in vain, which took most of its time."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def hasten(patch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Returns what takes the language's meaning back; `patch` has the rest to undo.

    It gives the language its meaning once, not again for each launch and each function that a kernel calls; it looks
    for no overflow of integers, which it would only tell in debug mode; it makes the types and shapes of blocks once,
    and no broadcast where both sides have the same shape.
    """
    patch.setattr(interpreter, "_patch_attr", _give_meaning)
    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    patch.setattr(interpreter, "_patch_lang", lambda function: SimpleNamespace(restore=lambda: None))
    patch.setattr(interpreter, "_convert_float", _with_8_bit_floats(interpreter._convert_float))
    patch.setattr(interpreter, "_get_np_dtype", _looked_up_once(interpreter._get_np_dtype, lambda of: of.scalar.name))
    patch.setattr(tl.block_type, "__init__", _made_once(tl.block_type.__init__, _block_of))
    patch.setattr(tl.tensor, "__init__", _with_known_shape(tl.tensor.__init__))
    patch.setattr(TritonSemantic, "broadcast_impl_value", _unless_alike(TritonSemantic.broadcast_impl_value))
    patch.setattr(TritonSemantic, "computation_type_impl", _computed_once(TritonSemantic.computation_type_impl))
    builder = interpreter.interpreter_builder
    patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
    return scope.restore


def _give_meaning(owner: Any, name: str, member: Any, _: Any, scope: Any) -> None:
    semantic, function = interpreter.interpreter_semantic, getattr(member, "__wrapped__", member)

    def called(*arguments: Any, _semantic: Any = None, **keywords: Any) -> Any:
        return function(*arguments, _semantic=semantic, **keywords)

    scope.set_attr(owner, name, called)


def _looked_up_once(look_up: Callable[[Any], Any], key_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    found: dict[Any, Any] = {}

    def known(of: Any) -> Any:
        key = key_of(of)
        if key not in found:
            found[key] = look_up(of)
        return found[key]

    return known


def _shape_of(shape: Any) -> tuple[Any, ...]:
    return tuple(shape.values if isinstance(shape, tl.tuple) else shape)


def _block_of(element_type: Any, shape: Any) -> Any:
    return element_type.name, _shape_of(shape)


def _made_once(make: Callable[..., None], key_of: Callable[..., Any]) -> Callable[..., None]:
    """An `__init__` by which objects of the same arguments share what they are made of."""
    found: dict[Any, dict[str, Any]] = {}

    def init(made: Any, *arguments: Any) -> None:
        key = key_of(*arguments)
        if key in found:
            made.__dict__.update(found[key])
        else:
            make(made, *arguments)
            found[key] = dict(made.__dict__)

    return init


def _with_known_shape(make: Callable[..., None]) -> Callable[..., None]:
    found: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    def init(made: Any, handle: Any, kind: Any) -> None:
        key = _shape_of(kind.shape) if kind.is_block() else ()
        if key in found:
            made.handle, made.type, made.dtype, (made.shape, made.numel) = handle, kind, kind.scalar, found[key]
        else:
            make(made, handle, kind)
            found[key] = made.shape, made.numel

    return init


def _unless_alike(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    def broadcast_both(semantic: Any, left: Any, right: Any) -> Any:
        blocks = [each.type for each in (left, right) if each.type.is_block()]
        if not blocks or (len(blocks) == 2 and _shape_of(blocks[0].shape) == _shape_of(blocks[1].shape)):
            return left, right
        return broadcast(semantic, left, right)

    return broadcast_both


def _computed_once(compute: Callable[..., Any]) -> Callable[..., Any]:
    found: dict[Any, Any] = {}

    def known(semantic: Any, left: Any, is_left_scalar: bool, right: Any, is_right_scalar: bool, divides: bool) -> Any:
        key = left.name, is_left_scalar, right.name, is_right_scalar, divides
        if key not in found:
            found[key] = compute(semantic, left, is_left_scalar, right, is_right_scalar, divides)
        return found[key]

    return known


def _with_8_bit_floats(convert: Callable[..., Any]) -> Callable[..., Any]:
    """The interpreter rounds 31.5 to 16 in these, not to 32: a carry out of the mantissa is lost."""

    def converted(numbers: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.float32, tl.float8e4nv):
            return torch.from_numpy(numbers).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if (source, target) == (tl.float8e4nv, tl.float32):
            return torch.from_numpy(numbers).view(torch.float8_e4m3fn).float().numpy()
        return convert(numbers, source, target, rounding)

    return converted
