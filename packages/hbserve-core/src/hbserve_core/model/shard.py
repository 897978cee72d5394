"""Share of the model that one rank of a tensor-parallel instance has.

Projections into heads and into the MLP are split by their outputs, and those that lead back by their inputs, so a layer
needs only one sum over the ranks after each pair (Megatron-LM, Shoeybi et al. 2019). The embedding table and the output
projection are split by tokens of the vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hbserve_core.errors import InvalidInstanceConfig
from hbserve_core.model.model_config import ModelConfig

if TYPE_CHECKING:
    from hbserve_kv import HeadRange


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `rank` of `size` parts. The default is the whole model."""

    rank: int = 0
    size: int = 1

    def config(self, model: ModelConfig) -> ModelConfig:
        """Return the model's configuration with the sizes of this rank's layers. The size of the vocabulary stays
        whole, because logits are gathered."""
        experts = model.switches.experts
        if experts is not None and not experts.whole_on_ranks:
            experts = replace(experts, intermediate_size=experts.intermediate_size // self.size)
        return replace(
            model,
            switches=replace(model.switches, experts=experts),
            num_heads=model.num_heads // self.size,
            num_kv_heads=max(1, model.num_kv_heads // self.size),
            intermediate_size=model.intermediate_size // self.size,
        )

    def part(self, count: int, width: int = 1) -> slice:
        """Return this rank's share of `count` things that are `width` rows or columns each."""
        share = count // self.size * width
        return slice(self.rank * share, (self.rank + 1) * share)

    def kv_part(self, num_kv_heads: int, head_dim: int) -> slice:
        """Return the rows of this rank's key or value heads. If there are fewer heads than ranks, several ranks have
        the same head."""
        if num_kv_heads >= self.size:
            return self.part(num_kv_heads, head_dim)
        head = self.rank * num_kv_heads // self.size
        return slice(head * head_dim, (head + 1) * head_dim)

    def kv_heads(self, num_kv_heads: int) -> "HeadRange":
        """Return this rank's key or value heads, by their numbers."""
        from hbserve_kv import HeadRange  # imports torch, which `check_divisible` does without

        if num_kv_heads >= self.size:
            return HeadRange.of_rank(self.rank, self.size, num_kv_heads)
        return HeadRange(self.rank * num_kv_heads // self.size, 1, num_kv_heads)

    def is_first_with_kv_heads(self, num_kv_heads: int) -> bool:
        """Return whether this rank sends its heads. If several ranks have the same head, the first of them does."""
        return num_kv_heads >= self.size or self.rank % (self.size // num_kv_heads) == 0

    def num_tokens(self, vocab_size: int) -> int:
        """Return the number of rows of each rank's vocabulary. Those of the last rank may go beyond the end, where they
        are zero."""
        return -(-vocab_size // self.size)


def check_divisible(model: ModelConfig, size: int) -> None:
    """Raise InvalidInstanceConfig if the model cannot be split among `size` ranks; the message says which sizes are
    possible."""
    obstacles = list(_obstacles(model, size))
    if obstacles:
        allowed = [str(each) for each in range(1, model.num_heads + 1) if not any(_obstacles(model, each))]
        raise InvalidInstanceConfig(
            f"tensor_parallel_size={size}: {'; '.join(obstacles)}; allowed for {str(model.path)!r}: "
            f"{', '.join(allowed)}"
        )


def _obstacles(model: ModelConfig, size: int) -> Iterator[str]:
    if model.num_heads % size:
        yield f"num_attention_heads={model.num_heads} is not a multiple of it"
    if model.num_kv_heads % size and size % model.num_kv_heads:
        yield f"num_key_value_heads={model.num_kv_heads} is neither a multiple nor a divisor of it"
    experts = model.switches.experts
    if (experts is None or len(experts.layers) < model.num_layers) and model.intermediate_size % size:
        yield f"intermediate_size={model.intermediate_size} is not a multiple of it"
    if experts is not None and experts.whole_on_ranks and experts.count % size:
        yield f"num_experts={experts.count} is not a multiple of it, and expert_parallel=true"
    if experts is not None and not experts.whole_on_ranks and experts.intermediate_size % size:
        yield f"intermediate_size={experts.intermediate_size} of experts is not a multiple of it"
