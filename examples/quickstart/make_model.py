"""Write a toy Qwen2 model with random weights and its tokenizer, as a Hugging Face folder.

    python examples/quickstart/make_model.py --folder DIR --kind arithmetic --seed 0

`arithmetic` knows the characters of the quickstart's problems, one token each. `bytes` reads any text, one token for
each byte, and has a chat template: for trying the real data sets without a real model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils.logging import disable_progress_bar

END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
ANSWER_MARK = "#### "

# Qwen's own turns, so that what works here works there.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def arithmetic_tokenizer() -> Qwen2Tokenizer:
    """One token for each character of a sum, and one for the mark before an answer. No chat template."""
    vocabulary = {symbol: index for index, symbol in enumerate("0123456789+=")}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], eos_token=END, pad_token="<|pad|>", unk_token=END)
    tokenizer.add_tokens([AddedToken(ANSWER_MARK, special=False, normalized=False)])
    return tokenizer


def bytes_tokenizer() -> Qwen2Tokenizer:
    """One token for each byte of UTF-8, Qwen's special tokens and chat template. The end of a turn ends a response."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], eos_token=TURN_END, pad_token=END, unk_token=END, additional_special_tokens=[TURN_START]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Qwen2Tokenizer]] = {"arithmetic": arithmetic_tokenizer, "bytes": bytes_tokenizer}
CONTEXT_TOKENS = {"arithmetic": 64, "bytes": 4096}


def toy_config(tokenizer: Qwen2Tokenizer, *, context_tokens: int) -> Qwen2Config:
    """Two Qwen2 layers, about 0.4 million weights. Heads of 32 dimensions are the smallest that every engine takes."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context_tokens,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def write_model(folder: Path, *, kind: str, seed: int) -> int:
    """Write model and tokenizer into `folder`, which is created. The weights are a function of `seed`.

    Returns the number of weights.
    """
    tokenizer = TOKENIZERS[kind]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(toy_config(tokenizer, context_tokens=CONTEXT_TOKENS[kind]))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return int(model.num_parameters())


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser(description="Write a toy Qwen2 model and its tokenizer.")
    parser.add_argument("--folder", type=Path, required=True, help="where the model goes")
    parser.add_argument("--kind", choices=sorted(TOKENIZERS), default="arithmetic", help="what the tokenizer reads")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    options = parser.parse_args(arguments)
    disable_progress_bar()
    num_weights = write_model(options.folder, kind=options.kind, seed=options.seed)
    print(f"{options.folder}: Qwen2 with {num_weights:,} random weights, tokenizer of {options.kind}")


if __name__ == "__main__":
    main()
