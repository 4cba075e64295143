"""Rules about two sides that must agree and that no single part sees: tokenizers, chat template, stops, ends of sequences, and
the vocabularies of all models. Only what this machine has is compared; tokenizers are loaded, weights are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridflow.config.rules_files import model_paths, settings_in
from hybridflow.config.schema import Config
from hybridflow.errors import FieldError, FieldReport, FieldWarning, listed
from hybridflow.tokenizers import has_tokenizer, loaded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADAPTERS = "adapter_config.json"
CONTENT = "Said 4711 times"
"""Of the messages by which a chat template shows where turns begin and end; no template has it of its own."""


def adapters_are_merged(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """No model's folder holds adapters, which some parts of a run would add to the weights beside them, and others not."""
    for key, path in model_paths(config, roles).items():
        if (Path(path) / ADAPTERS).is_file():
            problem = (
                f"folder {path!r} holds adapters ({ADAPTERS}), which trainer, engine and export would read in different ways"
            )
            advice = (
                "Merge them (peft: merge_and_unload, then save_pretrained to a new folder), or move the adapter_* files away"
            )
            yield FieldError(key, f"{problem}. {advice}")


def sides_agree(config: Config, roles: tuple[str, ...]) -> Iterator[FieldReport]:
    """What tokenizer, template, stops and models say about tokens is the same everywhere."""
    key = "model.path" if config.model.tokenizer is None else "model.tokenizer"
    policy = load_side(config.model.tokenizer or config.model.path, config)
    if policy is None:  # other rules tell what is missing, or the ranks will
        return
    for model_key, path in model_paths(config, roles).items():
        yield from _tokens_have_rows(model_key, path, policy)
        if path != policy.path and (own := load_side(path, config)) is not None:
            yield from _same_ids(model_key if model_key != "model.path" else key, own, policy)
    yield from _vocabularies_reach(config, roles)
    if "rollout" in roles:
        yield from _stops_can_stop(config, policy)
    yield from _turns_end(config, roles, policy)
    yield from _template_asks(config, roles, policy)


@dataclass(frozen=True)
class Side:
    """A tokenizer and where it came from."""

    path: str
    tokenizer: PreTrainedTokenizerBase
    ids: Mapping[str, int]
    """Of each token."""

    def token(self, token_id: int) -> str:
        """Its text, quoted."""
        return repr(self.tokenizer.convert_ids_to_tokens(token_id))


def load_side(path: str, config: Config) -> Side | None:
    """The tokenizer of a folder, or of a name whose files are here; None where there is none."""
    folder = Path(path)
    if folder.is_dir() and not has_tokenizer(folder):
        return None
    try:
        tokenizer = loaded(path, trust_remote_code=config.model.trust_remote_code, local_files_only=not folder.is_dir())
    except Exception:  # a tokenizer fails in its own ways; whoever needs it tells how
        return None
    return Side(path, tokenizer, tokenizer.get_vocab())


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token by which the chat template ends what an assistant said; None where it has none, or no template.

    Example: with `<|im_start|>assistant\\n{content}<|im_end|>\\n` it is that of `<|im_end|>`.
    """
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": CONTENT}, {"role": "assistant", "content": CONTENT}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # a template may refuse any conversation, in any way
        return None
    after = tokenizer(text.rpartition(CONTENT)[2], add_special_tokens=False)["input_ids"]
    special = special_ids(tokenizer)
    return next((token_id for token_id in after if token_id in special), None)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Of tokens that are left out of the text of a response."""
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _tokens_have_rows(key: str, path: str, policy: Side) -> Iterator[FieldError]:
    rows = settings_in(path).get("vocab_size")
    if not isinstance(rows, int):
        return
    if beyond := sorted((token_id, token) for token, token_id in policy.ids.items() if token_id >= rows):
        named = listed((f"{token!r} (id {token_id})" for token_id, token in beyond), most=3)
        problem = (
            f"{path!r} has {rows} embeddings, and {len(beyond)} tokens of the tokenizer {policy.path!r} have none: {named}"
        )
        resized = f"resize_token_embeddings({beyond[-1][0] + 1})"
        advice = f"Give the model rows for them ({resized}, then save it), or take its own tokenizer"
        yield FieldError(key, f"{problem}. {advice}", related=("model.tokenizer",))


def _same_ids(key: str, own: Side, policy: Side) -> Iterator[FieldError]:
    """A model reads the tokens that the policy's tokenizer makes."""
    different = sorted(token for token, token_id in policy.ids.items() if own.ids.get(token, token_id) != token_id)
    shared = policy.ids.keys() & own.ids.keys()
    if different or len(shared) < len(own.ids) // 2:
        first = different[0] if different else min(policy.ids.keys() - own.ids.keys())
        problem = (
            f"the tokenizer of {own.path!r} is another one than {policy.path!r}, by which this run makes tokens: "
            f"{len(different) or len(policy.ids) - len(shared)} of {len(policy.ids)} tokens differ, {first!r} is "
            f"{own.ids.get(first, 'none')} there and {policy.ids[first]} here. The model would read another text"
        )
        yield FieldError(key, f"{problem}. Use a model of the same tokenizer", related=("model.path", "model.tokenizer"))


def _vocabularies_reach(config: Config, roles: tuple[str, ...]) -> Iterator[FieldWarning]:
    """Each model can read what the policy can sample."""
    rows = {
        key: found
        for key, path in model_paths(config, roles).items()
        if isinstance(found := settings_in(path).get("vocab_size"), int)
    }
    sampled = rows.get("actor.path", rows.get("model.path", 0))
    for key, found in rows.items():
        if found < sampled and key != "model.path":
            problem = f"its model has {found} embeddings and the policy {sampled}, of which those above stand for no token"
            yield FieldWarning(
                key, f"{problem}. Should the policy sample one of these, the run ends: pad the model to {sampled}"
            )


def _stops_can_stop(config: Config, policy: Side) -> Iterator[FieldError]:
    """Stop strings are looked for in the text of a response, which has no special tokens; stop tokens can be sampled."""
    special = special_ids(policy.tokenizer)
    for stop in config.rollout.stop:
        if not stop:
            yield FieldError("rollout.stop", "has an empty text in it, which every response ends with. Leave it out")
            continue
        ids = policy.tokenizer(stop, add_special_tokens=False)["input_ids"]
        text = str(policy.tokenizer.decode(ids, skip_special_tokens=True))
        if found := [token_id for token_id in ids if token_id in special]:
            advice = (
                f"Name its token: rollout.stop_token_ids={[*config.rollout.stop_token_ids, found[0]]}, and take it out of stop"
            )
            problem = f"{stop!r} has the special token {policy.token(found[0])} in it, and the text of a response has none"
            yield FieldError("rollout.stop", f"{problem}: it would never stop. {advice}", related=("model.tokenizer",))
        elif "".join(stop.split()) not in "".join(text.split()):  # spaces at the beginning are some tokenizers' own
            problem = (
                f"{stop!r} cannot be written in the tokens of {policy.path!r}, which make it {text!r}: it would never stop"
            )
            yield FieldError("rollout.stop", f"{problem}. Use a string of its own characters", related=("model.tokenizer",))
    rows = settings_in(config.model.path).get("vocab_size")
    for token_id in config.rollout.stop_token_ids:
        if isinstance(rows, int) and token_id >= rows:
            problem = f"{token_id} is no token of {config.model.path!r}, which has {rows} (from 0): it would never stop"
            yield FieldError("rollout.stop_token_ids", f"{problem}. Leave it out", related=("model.path",))


def _turns_end(config: Config, roles: tuple[str, ...], policy: Side) -> Iterator[FieldReport]:
    """The token by which the chat template ends turns is one that ends a response."""
    end, never = turn_end(policy.tokenizer), config.data.apply_chat_template == "never"
    ends = end_ids(config.model.path, policy.tokenizer)
    if end is None or end in ends or never:
        return
    told = f"the chat template of {policy.path!r} ends turns with {policy.token(end)} (id {end})"
    others = ", ".join(f"{policy.token(other)} (id {other})" for other in ends) or "no token"
    if "rollout" not in roles:
        problem = f"{told}, and sequences end with {others}. Rows are trained to end as the template does"
        yield FieldWarning("model.path", f"{problem}; set eos_token of the tokenizer and eos_token_id of the model to {end}")
    elif not config.rollout.stop_token_ids and not config.rollout.ignore_eos:
        problem = f"{told}, but generation ends with {others}: answers would run to data.max_response_tokens"
        advice = f"Set rollout.stop_token_ids=[{end}], or eos_token_id in the model's generation_config.json"
        as_it_is = f"; rollout.stop_token_ids={list(ends)} keeps it as it is" if ends else ""
        yield FieldError("rollout.stop_token_ids", f"{problem}. {advice}{as_it_is}", related=("model.path", "model.tokenizer"))


def _template_asks(config: Config, roles: tuple[str, ...], policy: Side) -> Iterator[FieldReport]:
    """The chat template writes what it is given, and where an answer is to begin."""
    if not policy.tokenizer.chat_template or config.data.apply_chat_template == "never":
        return
    told, asked = f"the chat template of {policy.path!r}", [{"role": "user", "content": CONTENT}]
    options: Any = config.data.chat_template_options

    def rendered(messages: list[dict[str, str]], adds: bool) -> str:
        return str(policy.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=adds, **options))

    try:
        with_prompt, without = (rendered(asked, adds) for adds in (True, False))
        answered = [*asked, {"role": "assistant", "content": CONTENT}]
        # Where nothing stands between a question and its answer, as in [INST] ... [/INST], there is nothing to open.
        opening = rendered(answered, False) if with_prompt == without else ""
    except Exception as error:  # likewise
        reason = str(error).partition("\n")[0]
        yield FieldWarning("model.path", f"{told} refuses a message of the user: {reason}")
        return
    if CONTENT not in with_prompt:
        problem = (
            f"the chat template of {policy.path!r} leaves out what the user says: every prompt would be {with_prompt!r:.100}"
        )
        yield FieldError(
            "model.path", f"{problem}. Correct it, or set data.apply_chat_template=never", related=("model.tokenizer",)
        )
    elif with_prompt == without and "rollout" in roles and opening.removeprefix(without).partition(CONTENT)[0].strip():
        problem = f"{told} does not say where an answer begins (add_generation_prompt)"
        yield FieldWarning("model.path", f"{problem}: the model has to open its own turn")


def end_ids(model: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a sequence by the model's files and the tokenizer's."""
    named = [settings_in(model, file).get("eos_token_id") for file in ("config.json", "generation_config.json")]
    ids: set[int] = set()
    for found in (*named, tokenizer.eos_token_id):
        given: Iterable[object] = found if isinstance(found, list) else [found]
        ids.update(token_id for token_id in given if isinstance(token_id, int))
    return tuple(sorted(ids))
