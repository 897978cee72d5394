"""Small random models, which transformers writes to disk."""

from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def _write_tokenizer(folder: Path) -> None:
    """Write a tokenizer over bytes, so that any text, Chinese too, has tokens that decode to it."""
    import transformers as typed
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    transformers: Any = typed
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {symbol: 3 + i for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    ).save_pretrained(folder)


def write_small_model(folder: Path, architecture: str, **changed: int) -> None:
    """Write a random float32 model with its tokenizer. `architecture` is qwen3, qwen2, llama, gemma3 or qwen3-moe.
    Token 2 ends a sequence.

    `changed` are the values that differ from SMALL.
    """
    import torch
    import transformers as typed

    transformers: Any = typed  # its types refuse arguments that it accepts
    sizes = SMALL | changed
    configurations: dict[str, Any] = {
        "qwen3": lambda: transformers.Qwen3Config(**sizes, tie_word_embeddings=True),
        "qwen2": lambda: transformers.Qwen2Config(**{k: v for k, v in sizes.items() if k != "head_dim"}),
        "llama": lambda: transformers.LlamaConfig(**sizes),
        # gemma3 has a window that ends within a block, on one layer; qwen3-moe has experts on both layers.
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **sizes, sliding_window=21, sliding_window_pattern=2, query_pre_attn_scalar=16, pad_token_id=0
        ),
        "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
            **sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True
        ),
    }
    config = configurations[architecture]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Random models repeat one token; larger weights make the next token depend on the whole context.
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    if architecture == "gemma3":  # it multiplies embeddings by 8, so that each token would be followed by itself
        model.get_input_embeddings().weight.data /= 8
    model.save_pretrained(folder)
    _write_tokenizer(folder)
