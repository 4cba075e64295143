"""Where tokenizers are loaded: for rules about them, and for the data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
"""One of which a folder with a tokenizer has: from one without, transformers makes an empty tokenizer and says nothing."""


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer can be loaded from the folder."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def loaded(path: str, *, trust_remote_code: bool, local_files_only: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name. It fails in its own ways."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        path, trust_remote_code=trust_remote_code, local_files_only=local_files_only
    )
    return tokenizer
