"""When a response ends: which tokens end it, and whether its text has reached a stop string."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Detokenize = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens left out."""


def end_of_sequence_ids(model: str, tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool = False) -> tuple[int, ...]:
    """The tokens that end a sequence according to the generation configuration, the model's, and the tokenizer."""
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    named: list[int | list[int] | None] = [config.get_text_config().eos_token_id, tokenizer.eos_token_id]
    with contextlib.suppress(OSError):  # a model folder without generation_config.json is complete
        named.append(GenerationConfig.from_pretrained(model).eos_token_id)
    ids: set[int] = set()
    for found in named:
        ids |= set(found) if isinstance(found, list) else {found} if found is not None else set()
    return tuple(sorted(ids))


def detokenizer(tokenizer: PreTrainedTokenizerBase) -> Detokenize:
    """The tokenizer's decoding, past its Python layer where it has a Rust one: called for each token of a response."""
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        return lambda ids: str(backend.decode(ids, skip_special_tokens=True))
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True))


class StopStrings:
    """Watches the text of one response grow, token by token.

    Example:
        >>> watch = StopStrings(["ab"], lambda ids: "".join(map(chr, ids)))
        >>> [watch.ends_with(token) for token in (97, 97, 98)]  # a, a, b
        [False, False, True]
    """

    def __init__(self, stop: Sequence[str], detokenize: Detokenize):
        self.stop, self.detokenize = tuple(stop), detokenize
        self.tokens: list[int] = []
        """Those whose text is still needed to decode the next ones."""
        self.num_read = 0
        """How many of `tokens` have given their text."""
        self.tail = ""
        """End of the text, as long as a stop string that is complete but for one character."""

    def ends_with(self, token: int) -> bool:
        """Take in the next token; whether a stop string is complete."""
        self.tokens.append(token)
        known = self.detokenize(self.tokens[: self.num_read])
        text = self.detokenize(self.tokens)
        if len(text) <= len(known) or text.endswith("\ufffd"):  # half a character of several bytes: wait for the rest
            return False
        self.tail += text[len(known) :]
        self.tokens = self.tokens[self.num_read :]
        self.num_read = len(self.tokens)
        is_complete = any(stop in self.tail for stop in self.stop)
        self.tail = self.tail[-max(map(len, self.stop)) + 1 :] if max(map(len, self.stop)) > 1 else ""
        return is_complete


def end_across(seam: int, tokens: Sequence[int], stop: Sequence[str], detokenize: Detokenize) -> int | None:
    """With which number of tokens a response ends whose text completes a stop string at or behind token `seam`, having begun it
    before; None where it does not.

    Whoever generated the tokens from `seam` on has not seen those before.
    """
    reach = 4 * max(map(len, stop))  # a character has up to four tokens
    watch = StopStrings(stop, detokenize)
    for index in range(max(0, seam - reach), min(seam + reach, len(tokens))):
        if watch.ends_with(tokens[index]) and index >= seam:
            return index + 1
    return None
