"""The tokenizer, and prompts as the text that a model reads: chat template applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from hybridflow.errors import DataError, ModelError
from hybridflow.tokenizers import TOKENIZER_FILES, has_tokenizer, loaded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hybridflow.config.schema import Config

Message = Mapping[str, object]
TemplateUse = Literal["auto", "always", "never"]


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer of `model.tokenizer`, or of `model.path` where that is null. Raises as `tokenizer_at`."""
    model = config.model
    key = "model.path" if model.tokenizer is None else "model.tokenizer"
    return tokenizer_at(model.tokenizer or model.path, key=key, trust_remote_code=model.trust_remote_code)


def tokenizer_at(path: str, *, key: str = "model.tokenizer", trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name, which `key` of the configuration gave.

    Raises:
        ModelError: there is no such folder, or it holds no tokenizer.
    """
    _check_folder(path, key)
    try:
        return loaded(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # what damaged or foreign files end in is open
        raise ModelError(f"{key}={path!r}: the tokenizer does not load: {type(error).__name__}: {error}") from error


def _check_folder(path: str, key: str) -> None:
    """A folder without a tokenizer is told before transformers reads it."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if path.startswith(("/", "./", "../", "~")):
            raise ModelError(f"{key}={path!r}: there is no such folder")
        return
    if has_tokenizer(folder):
        return
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
    raise ModelError(
        f"{key}={path!r}: the folder has no tokenizer. Found {found}; expected one of {', '.join(TOKENIZER_FILES)}. "
        "Set model.tokenizer to a folder or hub name that has one"
    )


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
    """Token ids of each text."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False)
    return cast(list[list[int]], encoded["input_ids"])


def is_templated(tokenizer: PreTrainedTokenizerBase, *, has_messages: bool, use: TemplateUse) -> bool:
    """Whether prompts go through the chat template: message lists always, strings as `data.apply_chat_template` says.

    Raises:
        DataError: they should, and the tokenizer has no template.
    """
    if not has_messages and (use == "never" or (use == "auto" and not tokenizer.chat_template)):
        return False
    if tokenizer.chat_template:
        return True
    asked = "column 'prompt' holds chat messages" if has_messages else "data.apply_chat_template=always"
    raise DataError(
        f"{asked}, but the tokenizer has no chat template. Add a chat_template.jinja to its folder, "
        "set model.tokenizer to one that has it, or write the prompts as plain strings"
    )


class RowError(Exception):
    """A row of those at hand cannot be used; who knows the file says which row that is."""

    def __init__(self, row: int, problem: str):
        super().__init__(row, problem)
        self.row, self.problem = row, problem


def prompt_texts(
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[Message]],
    options: Sequence[Mapping[str, object]] | None = None,
) -> list[str]:
    """Each conversation as the text that ends where the model's answer begins; `options` of each are variables of the template.

    Raises:
        RowError: the chat template refuses a conversation.
    """

    apply = cast(Callable[..., list[str]], tokenizer.apply_chat_template)  # its types know fewer variables than templates have

    def render(some: list[list[Message]], given: Mapping[str, object]) -> list[str]:
        return apply(some, tokenize=False, add_generation_prompt=True, **given)

    each = options or [{}] * len(conversations)
    try:
        if all(given == each[0] for given in each):
            return render(conversations, each[0] if each else {})
        return [render([conversation], given)[0] for conversation, given in zip(conversations, each, strict=True)]
    except Exception as first_error:  # a template may end in anything
        for row, (conversation, given) in enumerate(zip(conversations, each, strict=True)):
            try:
                render([conversation], given)
            except Exception as error:
                problem = f"the tokenizer's chat template refuses the prompt ({error}): {conversation!s:.500}"
                raise RowError(row, problem) from error
        raise DataError(f"the tokenizer's chat template fails: {first_error}") from first_error
