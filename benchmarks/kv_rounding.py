"""Effect of rounding keys and values to 8 bits on a model's answers, by format, and by what has a scale of its own.

    uv run benchmarks/kv_rounding.py [--model FOLDER] [--texts FILE ...] [--tokens 512]

transformers reads texts in float32; only the content of its cache is rounded. A place is one token of a text. "same" is
the share of places at which the likeliest next token is the same as without rounding. "gap" is, at the other places,
the largest difference between the log-probabilities of the two likeliest tokens. Then follow relative errors of keys
and values by layer, for the way of the engine's own pool and for the best one.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from hbserve.models.demo_model import model_folder

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", ROOT / "docs/concepts.md", ROOT / "docs/rationale.md", ROOT / "docs/hosts.md"]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Rounding = Callable[[torch.Tensor], torch.Tensor]


def as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


def to_bfloat16(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


def to_format(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    most = torch.finfo(dtype).max
    return x.clamp(-most, most).to(dtype).float()


def scaled(dtype: torch.dtype, axes: tuple[int, ...]) -> Rounding:
    """Make a rounding with scales. Numbers along `axes` of (1, H, T, D) share a scale, which maps the largest of them
    to the format's largest number."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(axes, keepdim=True) / torch.finfo(dtype).max
        return to_format(x / scale, dtype) * scale

    return rounded


def integers(axes: tuple[int, ...]) -> Rounding:
    """Make a rounding to evenly spaced numbers of 8 bits."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(axes, keepdim=True) / 127
        return (x / scale).round() * scale

    return rounded


TENSOR, TOKEN_HEAD, CHANNEL = (1, 2, 3), (3,), (2,)


def one(x: torch.Tensor) -> torch.Tensor:
    """Round as the pool does if a checkpoint has no scales."""
    return to_format(x, E4M3)


WAYS: dict[str, tuple[Rounding, Rounding]] = {
    "bfloat16": (to_bfloat16, to_bfloat16),
    "e4m3, scale 1 (the pool's)": (one, one),
    "e4m3, scale 1, keys alone": (one, as_it_is),
    "e4m3, scale 1, values alone": (as_it_is, one),
    "e4m3, a scale per tensor": (scaled(E4M3, TENSOR), scaled(E4M3, TENSOR)),
    "e4m3, per token and head, keys alone": (scaled(E4M3, TOKEN_HEAD), as_it_is),
    "e4m3, per token and head, values alone": (as_it_is, scaled(E4M3, TOKEN_HEAD)),
    "e4m3, per token and head": (scaled(E4M3, TOKEN_HEAD), scaled(E4M3, TOKEN_HEAD)),
    "e4m3, keys per channel, values per token and head": (scaled(E4M3, CHANNEL), scaled(E4M3, TOKEN_HEAD)),
    "e5m2, scale 1": (lambda x: to_format(x, E5M2), lambda x: to_format(x, E5M2)),
    "e5m2, per token and head": (scaled(E5M2, TOKEN_HEAD), scaled(E5M2, TOKEN_HEAD)),
    "int8, per tensor": (integers(TENSOR), integers(TENSOR)),
    "int8, per token and head": (integers(TOKEN_HEAD), integers(TOKEN_HEAD)),
    "int8, keys per channel, values per token and head": (integers(CHANNEL), integers(TOKEN_HEAD)),
}
BY_LAYER = ("e4m3, scale 1 (the pool's)", "e4m3, per token and head", "int8, per token and head")


class RoundedCache(DynamicCache):
    """A cache that rounds like a pool: attention reads a token's own keys and values from it, too."""

    def __init__(self, keys: Rounding, values: Rounding) -> None:
        super().__init__()
        self._roundings = keys, values
        self.held: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (rounding(x) for rounding, x in zip(self._roundings, (key_states, value_states), strict=True))
        self.held.append((keys, values))
        return super().update(keys, values, *args, **kwargs)


def read(
    model: torch.nn.Module, ids: torch.Tensor, way: tuple[Rounding, Rounding]
) -> tuple[torch.Tensor, RoundedCache]:
    """Read a text. Returns log-probabilities, (T, V), and the cache."""
    cache = RoundedCache(*way)
    return model(ids[None], past_key_values=cache, use_cache=True).logits[0].log_softmax(-1), cache


def of_layers(found: RoundedCache, exact: RoundedCache) -> torch.Tensor:
    """Return the relative errors of keys and of values by layer: (2, layers)."""
    errors = [
        [(mine - theirs).norm() / theirs.norm() for mine, theirs in zip(ours, true, strict=True)]
        for ours, true in zip(found.held, exact.held, strict=True)
    ]
    return torch.tensor(errors).T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model; the demo model without it")
    parser.add_argument("--texts", type=Path, nargs="+", default=TEXTS)
    parser.add_argument("--tokens", type=int, default=512, help="of each text")
    given = parser.parse_args()
    folder = given.model or model_folder(None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer(path.read_text(), return_tensors="pt").input_ids[0, : given.tokens] for path in given.texts]
    with torch.inference_mode():
        exact = [read(model, ids, (as_it_is, as_it_is)) for ids in texts]
        places = sum(map(len, texts))
        print(
            f"| {places} places of {len(texts)} texts | same | largest gap | mean KL |\n|---|---|---|---|", flush=True
        )
        layers: dict[str, torch.Tensor] = {}
        for name, way in WAYS.items():
            same, gap, divergence = 0, 0.0, 0.0
            for ids, (true, cache) in zip(texts, exact, strict=True):
                found, kept = read(model, ids, way)
                layers[name] = layers.get(name, 0) + of_layers(kept, cache) / len(texts)
                is_same = found.argmax(-1) == true.argmax(-1)
                same += int(is_same.sum())
                best = true[~is_same].topk(2, dim=-1).values
                gap = max(gap, *(best[:, 0] - best[:, 1]).tolist(), 0.0)
                divergence += float((true.exp() * (true - found)).sum())
            print(f"| {name} | {same / places:.1%} | {gap:.2f} | {divergence / places:.5f} |", flush=True)
    shown = range(0, len(layers[BY_LAYER[0]][0]), 5)
    print("\n| layer | " + " | ".join(map(str, shown)) + " |\n|" + "---|" * (len(shown) + 1))
    for name in BY_LAYER:
        for kind, errors in zip(("keys", "values"), layers[name].tolist(), strict=True):
            print(f"| {name}: {kind} | " + " | ".join(f"{errors[i]:.3f}" for i in shown) + " |")


if __name__ == "__main__":
    main()
