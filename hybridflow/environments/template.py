"""Conversations as tokens: what the policy sampled stays as it is, and only what is appended is tokenised.

What follows a turn of the policy is what the chat template writes behind it, found by rendering the conversation with a mark in
the place of that turn. Whatever a template does to what was said before (Qwen3 leaves out thoughts) changes no token that is
there already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from hybridflow.data.chat import encode
from hybridflow.environments.base import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_BOUND = 100_000
"""Characters that are always tokenised."""
MARK = "theturnofthepolicystandshere"
"""Stands for what the policy said: nothing that a template would trim, split or look for."""


class TemplateError(Exception):
    """The chat template does not take a conversation."""


class TemplateTokens:
    """Tokens of conversations by the tokenizer's chat template; without one, messages are written one behind the other.

    Example:
        conversations.opening([{"role": "user", "content": "Guess."}])
        # ('<|im_start|>user\\nGuess.<|im_end|>\\n<|im_start|>assistant\\n', [151644, 872, ...])
        said = [*said, {"role": "assistant", "content": "50"}]
        tokens += conversations.appended(said, [{"role": "user", "content": "Higher."}], behind=tokens)
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, use_template: bool = True, options: Mapping[str, object] | None = None
    ):
        self.tokenizer = tokenizer
        self.options = dict(options or {})
        """Of the template: `data.chat_template_options`."""
        self.use_template = use_template and bool(tokenizer.chat_template)

    def may_fit(self, messages: Sequence[Message], most_tokens: int) -> bool:
        """False where messages have more characters than so many tokens could say: such a text is not tokenised, which takes a
        second for each megabyte."""
        num_characters = sum(len(str(message["content"])) for message in messages)
        return num_characters <= max(LEAST_BOUND, most_tokens * self._longest)

    @cached_property
    def _longest(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self.tokenizer.get_vocab()))

    def opening(self, messages: Sequence[Message], tools: Sequence[Mapping[str, object]] = ()) -> tuple[str, list[int]]:
        """The text and tokens that end where the policy begins.

        Raises:
            TemplateError: the chat template does not take them.
        """
        text = self._render(messages, tools) if self.use_template else _joined(messages)
        return text, self._encode(text, add_special_tokens=not self.use_template)

    def appended(
        self,
        said: Sequence[Message],
        added: Sequence[Message],
        tools: Sequence[Mapping[str, object]] = (),
        *,
        behind: Sequence[int],
    ) -> list[int]:
        """The tokens that follow `behind`, the tokens of the last turn of the policy, up to where its next one begins: the end
        of the turn, as far as it was not sampled, and `added`.

        `said` is the conversation so far; its last message is that turn.

        Raises:
            TemplateError: the chat template does not take the messages.
        """
        if not self.use_template:
            return self._encode(_joined(added))
        marked = {"role": "assistant", "content": MARK}
        try:
            text = self._render([*said[:-1], marked, *added], tools)
        except TemplateError:  # for example of an order of roles that a rewritten history has; what follows a turn is alike
            text = self._render([{"role": "user", "content": "?"}, marked, *added], tools)
        if MARK not in text:
            raise TemplateError("the chat template leaves out what the policy said, so that nothing can be appended to it")
        tokens = self._encode(text.rpartition(MARK)[2])
        return tokens[_overlap(behind, tokens, most=len(self._ending)) :]

    @cached_property
    def _ending(self) -> list[int]:
        """The tokens with which the template ends a turn of the policy."""
        shown = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
        text = self._render(shown, (), add_generation_prompt=False)
        return self._encode(text.rpartition(MARK)[2])

    def _encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        if self.tokenizer.is_fast:  # past its Python layer: called for each turn
            return list(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        (tokens,) = encode(self.tokenizer, [text], add_special_tokens=add_special_tokens)
        return list(tokens)

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, object]], *, add_generation_prompt: bool = True
    ) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                cast(list[dict[str, str]], [dict(message) for message in messages]),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **cast(dict[str, Any], {**self.options, **({"tools": [dict(tool) for tool in tools]} if tools else {})}),
            )
        except Exception as error:  # a template may end in anything
            roles = ", ".join(str(message["role"]) for message in messages)
            raise TemplateError(f"the chat template refuses messages of the roles {roles}: {error}") from error
        return str(text)


def _joined(messages: Sequence[Message]) -> str:
    return "".join(str(message["content"]) for message in messages)


def _overlap(behind: Sequence[int], tokens: Sequence[int], *, most: int) -> int:
    """How many of the first tokens are the last ones of `behind` already."""
    for size in range(min(most, len(tokens), len(behind)), 0, -1):
        if list(behind[len(behind) - size :]) == list(tokens[:size]):
            return size
    return 0
