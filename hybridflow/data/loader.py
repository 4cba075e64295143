"""Which prompts each step gets: shuffled, several files mixed by weight, and resumable.

The order has no hidden random state. Epoch `e` of a stream is the permutation drawn from (run seed, stream, e), so the number
of prompts drawn so far says all that a resumed run needs. What an epoch has left when it cannot fill a step starts the next
step, which goes on with the following epoch.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from hybridflow.batch import Batch
from hybridflow.config.schema import Config
from hybridflow.data.conversations import CHAT_COLUMNS, Conversations
from hybridflow.data.curriculum import SUCCESS_RATE, ByColumn, BySuccess, Curriculum
from hybridflow.data.examples import Examples, read_examples
from hybridflow.data.parquet import ColumnSpec, has_column, is_number, open_parquet, values_of
from hybridflow.data.preferences import PREFERENCE_COLUMNS, Preferences
from hybridflow.data.prompts import DATA_SOURCE, EPISODE_COLUMNS, PROMPT_COLUMNS, Prompts, read_prompts
from hybridflow.data.responses import RESPONSE_COLUMNS, Responses, read_responses
from hybridflow.errors import ConfigError, DataError, FieldError
from hybridflow.rewards.ground_truths import why_unscored

VALIDATION_STEP = -1
"""Stands for the step in the seeds of validation, which are the same whenever it runs."""

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = npt.NDArray[np.int64]
RowKind = Literal["prompts", "responses", "preferences"]
"""What an algorithm's rows are: see `Algorithm.rows`."""


Dataset = Prompts | Responses | Examples
"""Rows that a loader draws from."""


class PromptLoader:
    """Draws `prompts_per_step` rows for each step.

    Without weights all files are one stream; with `weights`, one per file, each file is a stream with its own epochs and
    gives its share of every step to within one prompt.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        prompts_per_step: int,
        seed: int,
        shuffle: bool = True,
        weights: Sequence[float] = (),
        curriculum: Curriculum | None = None,
    ):
        self.dataset, self.prompts_per_step, self.seed = dataset, prompts_per_step, seed
        sizes = dataset.rows_per_file if weights else (len(dataset),)
        _check_weights(weights, sizes)
        self.curriculum = curriculum
        starts = np.cumsum([0, *sizes])
        self._streams = [
            _Stream(int(first), size, key=(seed % 2**63, index), shuffle=shuffle, curriculum=curriculum)
            for index, (first, size) in enumerate(zip(starts, sizes, strict=False))
        ]
        self._shares = np.array(weights or [1.0], np.float64) / sum(weights or [1.0])
        self._drawn = np.zeros(len(sizes), np.int64)
        self._step, self._seen = 0, dict[int, int]()
        """How often the step that prompts were last drawn for has had each of them."""

    @property
    def num_prompts(self) -> int:
        """Prompts in the dataset, after filtering."""
        return len(self.dataset)

    @property
    def num_batches_per_epoch(self) -> int:
        """Whole steps in one pass over the data; 1 where a step takes more than one pass."""
        return max(1, self.num_prompts // self.prompts_per_step)

    def next_batch(self, step: int, count: int | None = None) -> Batch:
        """`count` prompts of step `step`, by default as many as a step has. The step enters the seeds; which prompts come
        depends on how many were drawn before."""
        num_prompts = self.prompts_per_step if count is None else count
        counts = np.zeros(len(self._streams), np.int64)
        order = np.empty(num_prompts, np.int64)
        for place in range(num_prompts):
            # The stream that is furthest behind its share: neighbours in the step come from different files.
            behind = self._shares * (self._drawn.sum() + place + 1) - (self._drawn + counts)
            order[place] = np.argmax(behind)
            counts[order[place]] += 1
        rows = np.empty(num_prompts, np.int64)
        for index, stream in enumerate(self._streams):
            rows[order == index] = stream.rows(int(self._drawn[index]), int(counts[index]))
        self._drawn += counts
        return self._batch(rows, step)

    def validation_batch(self) -> Batch:
        """All prompts once, in file order, with the same seeds at each call."""
        return self._batch(np.arange(len(self.dataset)), VALIDATION_STEP)

    def _batch(self, rows: Rows, step: int) -> Batch:
        columns = self.dataset.columns(rows)
        prompt_ids = columns["prompt_id"]
        assert isinstance(prompt_ids, np.ndarray), "prompt_id is a number per row"
        if step != self._step or step == VALIDATION_STEP:
            self._step, self._seen = step, {}
        seeds = []
        for prompt in prompt_ids.tolist():
            self._seen[prompt] = self._seen.get(prompt, -1) + 1
            seeds.append(prompt_seed(self.seed, step, prompt, occurrence=self._seen[prompt]))
        columns["seed"] = np.array(seeds, np.int64)
        per_prompt = len(prompt_ids) // len(rows)  # of pairs two
        columns["group"] = np.repeat(np.arange(len(rows)), per_prompt)
        columns["sample"] = np.tile(np.arange(per_prompt), len(rows))
        return Batch.from_columns(columns)

    def prompts_again(self, keys: Batch) -> Batch:
        """The prompts that were drawn once with these `prompt_id`, `seed`, `group` and `sample`."""
        rows = self.dataset.rows_of(keys["prompt_id"])
        return Batch.from_columns(self.dataset.columns(rows)).join(keys)

    def note_success(self, prompt_ids: Rows, rates: npt.NDArray[np.float64]) -> None:
        """Prompts were answered with these success rates, which an order by success goes by."""
        if self.curriculum is not None:
            self.curriculum.note(self.dataset.rows_of(prompt_ids), rates)

    def state_dict(self) -> dict[str, object]:
        """Position in each stream, the streams' sizes, and what the curriculum has learned."""
        own = {} if self.curriculum is None else {"curriculum": self.curriculum.state_dict()}
        return {"drawn": self._drawn.tolist(), "num_rows": [stream.num_rows for stream in self._streams], **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Raises:
            DataError: the data is not the data that the state was taken from.
        """
        found = [stream.num_rows for stream in self._streams]
        if list(state["num_rows"]) != found:
            raise DataError(
                f"the checkpoint was written with {list(state['num_rows'])} prompts (per file if weighted), now {found}. "
                "Use the data.train_files, data.train_weights and data.max_prompt_tokens of then"
            )
        self._drawn = np.array(state["drawn"], np.int64)
        if self.curriculum is not None:
            self.curriculum.load_state_dict(state.get("curriculum", {}))


class _Stream:
    """An endless sequence of rows: epoch after epoch, each in its own order."""

    def __init__(self, first: int, num_rows: int, *, key: tuple[int, int], shuffle: bool, curriculum: Curriculum | None):
        self.first, self.num_rows, self.key, self.shuffle, self.curriculum = first, num_rows, key, shuffle, curriculum
        self._epoch_order = lru_cache(maxsize=2)(self._draw_order)

    def rows(self, position: int, count: int) -> Rows:
        """`count` rows from `position` on."""
        places = np.arange(position, position + count)
        epochs, within = np.divmod(places, self.num_rows)
        rows = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            rows[epochs == epoch] = self._epoch_order(int(epoch))[within[epochs == epoch]]
        return rows + self.first

    def _draw_order(self, epoch: int) -> Rows:
        order = np.arange(self.num_rows)
        if self.shuffle:
            order = np.random.default_rng([*self.key, epoch]).permutation(self.num_rows)
        if self.curriculum is None:
            return order
        keys = self.curriculum.keys(self.key[1], epoch, slice(self.first, self.first + self.num_rows))
        return order[np.argsort(keys[order], kind="stable")]


def prompt_seed(run_seed: int, step: int, prompt: int, *, occurrence: int = 0) -> int:
    """63 bits that are a function of these numbers alone, on every machine.

    `occurrence` counts the times that a step has the prompt, where a step is larger than the dataset or crosses epochs: its
    copies get different responses.
    """
    packed = struct.pack("<Qqqq", run_seed % 2**64, step, prompt, occurrence)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def _check_weights(weights: Sequence[float], sizes: Sequence[int]) -> None:
    assert len(weights) in (0, len(sizes)), "as many weights as files: config/rules checks this"
    for index, size in enumerate(sizes):
        if weights and not size:
            raise DataError(f"file {index} of data.train_files has no prompts left, but data.train_weights gives it a share")


@dataclass(frozen=True)
class Loaders:
    """Of all files of a run."""

    train: PromptLoader
    validation: PromptLoader | None
    """Prompts: validation generates."""
    held_out: PromptLoader | None
    """Rows like those of `train`."""


def build_loaders(config: Config, tokenizer: PreTrainedTokenizerBase, rows: RowKind) -> Loaders:
    """The loader of training rows, and those of validation prompts and held-out rows where there are files of them.

    Raises:
        DataError: a file or column is missing or malformed, or nothing is left after filtering.
    """
    data, seed = config.data, config.run.seed
    trained = read_rows(config, data.train_files, tokenizer, rows, key="data.train_files")
    train = PromptLoader(
        trained,
        prompts_per_step=data.prompts_per_step,
        seed=seed,
        shuffle=data.shuffle,
        weights=data.train_weights,
        curriculum=curriculum_of(config, trained),
    )
    validation = held_out = None
    if data.validation_files:
        prompts = read_prompts(
            data.validation_files,
            tokenizer,
            data=data,
            key="data.validation_files",
            max_prompts=config.validation.max_prompts,
            columns=prompt_columns(config),
        )
        validation = PromptLoader(prompts, prompts_per_step=len(prompts), seed=seed, shuffle=False)
    if data.held_out_files:
        dataset = read_rows(config, data.held_out_files, tokenizer, rows, key="data.held_out_files")
        held_out = PromptLoader(dataset, prompts_per_step=len(dataset), seed=seed, shuffle=False)
    return Loaders(train, validation, held_out)


def read_rows(config: Config, files: Sequence[str], tokenizer: PreTrainedTokenizerBase, rows: RowKind, *, key: str) -> Dataset:
    """The rows of files as an algorithm wants them. Responses are either the column `response` or those of `messages`."""
    match rows:
        case "prompts":
            columns = [*prompt_columns(config), *order_columns(config)]
            return read_prompts(files, tokenizer, data=config.data, key=key, columns=columns)
        case "preferences":
            return read_examples(files, PREFERENCE_COLUMNS, Preferences(tokenizer, config.data), key=key, per_row=2)
        case "responses":
            if all(has_column(path, "messages", key=key) for path in files):
                return read_examples(files, CHAT_COLUMNS, Conversations(tokenizer, config.data), key=key)
            return read_responses(files, tokenizer, data=config.data, key=key)


def check_columns(config: Config, rows: RowKind) -> None:
    """Look at the columns of those of the run's files that are on this machine; nothing is started for it, no row is read.

    Raises:
        ConfigError: one for each file that lacks a column or has it with another type.
    """
    errors, data = [], config.data
    prompts = prompt_columns(config)
    of_training = [*prompts, *order_columns(config)] if rows == "prompts" else PREFERENCE_COLUMNS
    expected = {"data.train_files": of_training, "data.held_out_files": of_training, "data.validation_files": prompts}
    files = {"data.train_files": data.train_files, "data.held_out_files": data.held_out_files}
    for key, paths in {**files, "data.validation_files": data.validation_files}.items():
        for path in filter(os.path.isfile, paths):
            try:
                columns = expected[key]
                if rows == "responses" and key in files:
                    columns = CHAT_COLUMNS if has_column(path, "messages", key=key) else RESPONSE_COLUMNS
                open_parquet(path, columns, key=key)
            except DataError as error:
                errors.append(FieldError(key, str(error).removeprefix(f"{key}: ")))
    if errors:
        raise ConfigError(errors)


def check_sources(config: Config, rows: RowKind) -> None:
    """Look at the data sources of prompts that will be scored, in those of the run's files that are on this machine. Of
    validation, the first `validation.max_prompts`.

    Raises:
        ConfigError: there are such that no reward is for; the first one is named.
    """
    data, most = config.data, config.validation.max_prompts
    files = {"data.train_files": data.train_files if rows == "prompts" else (), "data.validation_files": data.validation_files}
    errors = []
    for key, paths in files.items():
        sources = (source for path in filter(os.path.isfile, paths) for source in values_of(path, DATA_SOURCE, key=key))
        seen = Counter(islice(sources, most if key == "data.validation_files" else None))
        problems = {source: problem for source in seen if (problem := why_unscored(config.reward, str(source)))}
        if problems:
            unscored = f"{sum(seen[source] for source in problems):,} of {seen.total():,} rows cannot be scored"
            errors.append(FieldError(key, f"{unscored}: {next(iter(problems.values()))}"))
    if errors:
        raise ConfigError(errors)


def order_columns(config: Config) -> list[ColumnSpec]:
    """The column that `data.curriculum` names."""
    name = config.data.curriculum
    if name in (None, SUCCESS_RATE):
        return []
    return [ColumnSpec(name=name, expected="a number, by which data.curriculum orders", fits=is_number)]


def curriculum_of(config: Config, dataset: Dataset) -> Curriculum | None:
    """The order that `data.curriculum` asks for."""
    name = config.data.curriculum
    if name is None or not isinstance(dataset, Prompts):
        return None
    return BySuccess(len(dataset)) if name == SUCCESS_RATE else ByColumn(dataset.stored[name].take(np.arange(len(dataset))))


def prompt_columns(config: Config) -> Sequence[ColumnSpec]:
    """What prompt files have to hold: environments, and rewards without rules, need neither ground truth nor source."""
    has_rules = config.reward.path is not None or config.reward.name != "none"
    return PROMPT_COLUMNS if has_rules and not config.environment.is_set else EPISODE_COLUMNS
