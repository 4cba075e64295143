"""Models of real shape with random weights, and prompts of real length, for measuring speed without downloads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Qwen2 model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool

    def config(self) -> Qwen2Config:
        """The model's configuration."""
        return Qwen2Config(
            architectures=["Qwen2ForCausalLM"],
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=8192,
            tie_word_embeddings=self.tied,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )


SHAPES = {
    "0.5b": Shape(hidden=896, intermediate=4864, layers=24, heads=14, kv_heads=2, vocabulary=151936, tied=True),
    "7b": Shape(hidden=3584, intermediate=18944, layers=28, heads=28, kv_heads=4, vocabulary=152064, tied=False),
    "tiny": Shape(hidden=128, intermediate=256, layers=2, heads=4, kv_heads=2, vocabulary=512, tied=True),
}
NUM_SPECIAL = 2


def make_model(folder: Path, shape: Shape) -> None:
    """Write `folder`/model and `folder`/tokenizer: every word `w17` is one token. Nothing happens where they exist.

    Two folders, since transformers takes the tokenizer class of a model's own folder from the kind of the model.
    """
    if (folder / "tokenizer" / "tokenizer.json").exists():
        return
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen2ForCausalLM(shape.config())
        torch.set_default_dtype(torch.float32)
    model.to("cpu").save_pretrained(folder / "model")
    words = {"<bos>": 0, "<eos>": 1} | {f"w{token}": token for token in range(NUM_SPECIAL, shape.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")
    fast.save_pretrained(folder / "tokenizer")


def make_prompts(path: Path, *, num_prompts: int, vocabulary: int) -> None:
    """Write prompts of 60 to 180 tokens, about the lengths of GSM8K with its instruction."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(60, 180, num_prompts)
    prompts = [" ".join(f"w{token}" for token in rng.integers(NUM_SPECIAL, vocabulary, length)) for length in lengths]
    columns = {
        "prompt": prompts,
        "data_source": ["benchmark"] * num_prompts,
        "reward_model": [{"ground_truth": "0"}] * num_prompts,
        "extra_info": [{"index": index} for index in range(num_prompts)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
