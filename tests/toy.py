"""A language model of 0.1M random weights with a working tokenizer: real enough for every engine, small enough for a test."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz +-*/=.,:;?!#$()<>|\\{}\n'"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tiny_tokenizer() -> Qwen2Tokenizer:
    """One token per character, other characters dropped; ids 0 to 3 are `<pad>`, `<bos>`, `<eos>`, `<unk>`.

    Byte-level without merges, since AutoTokenizer reads every tokenizer.json beside a Qwen2 as Qwen2's own class.
    """
    to_bytes = ByteLevel(add_prefix_space=False, use_regex=False)
    characters = [to_bytes.pre_tokenize_str(character)[0][0] for character in CHARACTERS]
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *characters))}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_tiny_model(folder: str | Path, *, seed: int = 0, **overrides: object) -> str:
    """Write a random Qwen2ForCausalLM and its tokenizer to `folder`, and return it as a string.

    `overrides` replace values of the Qwen2Config. Weights are a function of `seed` and are ten times larger than
    usual, so that distributions are uneven and a wrong cache or mask changes tokens.
    """
    tokenizer = make_tiny_tokenizer()
    values: dict[str, object] = {
        "vocab_size": len(SPECIAL_TOKENS) + len(CHARACTERS),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(Qwen2Config(**{**values, **overrides}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
