"""Write data and a toy model for the two environments of this folder.

    python examples/environments/make_toy.py --task guessing --folder outputs/guessing
    python examples/environments/make_toy.py --task calculator --folder outputs/calculator

The tokenizer has a chat template, one token for each digit, and one for each piece of a tool call: what a real model writes
in twenty tokens, the toy writes in six. Training rows of the calculator carry the homework of a careless pupil, for a first
stage of supervised fine-tuning: now and then he uses the calculator, and often he copies its result wrongly.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils.logging import disable_progress_bar

from hybridflow.data.prepare import PreparedRow, write_parquet

END, PAD = "<|end|>", "<|pad|>"
CALL_OPEN = '<tool_call>\n{"name": "calculate", "arguments": {"expression": "'
CALL_CLOSE = '"}}\n</tool_call>'
WORDS = ("<|user|>", "<|assistant|>", "<|tool|>", "guess", "digit?", "higher", "lower", "error", CALL_OPEN, CALL_CLOSE)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['tool_calls'] %}{% for call in message['tool_calls'] %}"
    "<tool_call>\n{\"name\": \"{{ call['function']['name'] }}\", \"arguments\": {{ call['function']['arguments'] | tojson }}}"
    "\n</tool_call>{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NUM_VALIDATION = 256


def toy_tokenizer() -> Qwen2Tokenizer:
    """Digits, operators and the words of the two games, one token each; other characters are left out."""
    vocabulary = {symbol: index for index, symbol in enumerate("0123456789+-*=")}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], eos_token=END, pad_token=PAD, unk_token=PAD)
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in WORDS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_model(folder: Path, *, seed: int) -> None:
    """A Qwen2 of 0.4 million random weights, and the tokenizer."""
    tokenizer = toy_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def guessing_rows(draw: random.Random, count: int) -> Iterator[PreparedRow]:
    """The same prompt each time; what is to be guessed differs."""
    for _ in range(count):
        secret = draw.randrange(10)
        yield PreparedRow(prompt=[{"role": "user", "content": "guess"}], ground_truth=str(secret), data_source="guessing")


def calculator_rows(draw: random.Random, count: int) -> Iterator[PreparedRow]:
    """Products of two digits, with a pupil's episode as the response."""
    for _ in range(count):
        first, second = draw.randrange(10), draw.randrange(10)
        right = str(first * second)
        answer = right if draw.random() < 0.5 else str(draw.randrange(82))
        called = f"{CALL_OPEN}{first}*{second}{CALL_CLOSE}{END}<|tool|>{right}{END}<|assistant|>{answer}"
        yield PreparedRow(
            prompt=[{"role": "user", "content": f"{first}*{second}="}],
            ground_truth=right,
            data_source="calculator",
            response=called if draw.random() < 0.4 else str(draw.randrange(82)),
        )


TASKS = {"guessing": (guessing_rows, 2048), "calculator": (calculator_rows, 4096)}


def main() -> None:
    """Read the command line and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(TASKS), required=True)
    parser.add_argument("--folder", type=Path, required=True, help="gets train.parquet, validation.parquet and model/")
    parser.add_argument("--seed", type=int, default=0, help="of data and weights")
    options = parser.parse_args()
    disable_progress_bar()
    options.folder.mkdir(parents=True, exist_ok=True)
    make_rows, count = TASKS[options.task]
    rows = list(make_rows(random.Random(options.seed), count + NUM_VALIDATION))
    write_parquet(rows[NUM_VALIDATION:], options.folder / "train.parquet")
    write_parquet(rows[:NUM_VALIDATION], options.folder / "validation.parquet")
    write_model(options.folder / "model", seed=options.seed)
    print(f"{options.folder}: {count} rows, {NUM_VALIDATION} for validation, and a model of random weights")


if __name__ == "__main__":
    main()
