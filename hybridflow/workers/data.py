"""The data role: reads the dataset beside the other roles, so that the controller holds no prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeGuard

from hybridflow.batch import Batch
from hybridflow.checkpoint.arrays import load_arrays, save_arrays
from hybridflow.checkpoint.manifest import read_json
from hybridflow.config.load import load_algorithm
from hybridflow.config.schema import Config
from hybridflow.data.chat import load_tokenizer
from hybridflow.data.loader import PromptLoader, RowKind, build_loaders
from hybridflow.data.parquet import identity_of
from hybridflow.data.prompts import Prompts
from hybridflow.data.rollouts import write_rows
from hybridflow.errors import DamagedCheckpointError, DataError
from hybridflow.rewards.ground_truths import check_ground_truths, is_scored_by_rules
from hybridflow.workers.base import RankContext, Worker
from hybridflow.workers.remote import remote

STATE_FILE = "loader.json"
PROMPTS_FILE, SAID_FILE = "prompts_under_way.npz", "responses_under_way.npz"


@dataclass(frozen=True)
class DataSummary:
    """What `DataWorker.open` found."""

    num_prompts: int
    """Training prompts after filtering."""
    steps_per_epoch: int
    num_validation_prompts: int


class DataWorker(Worker):
    """Prompts of each step, in an order that a resumed run continues. Rank 0 does all of it."""

    is_distributed: ClassVar[bool] = False

    @classmethod
    def imports(cls, config: Config) -> tuple[str, ...]:
        return ("torch", "transformers.models.auto.tokenization_auto")

    def __init__(self, config: Config, context: RankContext):
        super().__init__(config, context)
        self.train: PromptLoader | None = None
        self.validation: PromptLoader | None = None
        self.held_out: PromptLoader | None = None
        self.files: list[dict[str, int | str]] = []
        """Identities of the training files, as they were read."""

    @remote("rank_zero")
    def open(self, rows: RowKind) -> DataSummary:
        """Read the files; `rows` says what a row of the training files is.

        Raises:
            DataError: a file or column is missing or mistyped, or nothing is left after filtering.
        """
        self.files = [identity_of(path) for path in self.config.data.train_files]
        loaders = build_loaders(self.config, load_tokenizer(self.config), rows)
        for path, before in zip(self.config.data.train_files, self.files, strict=True):
            if Path(path).expanduser().exists() and identity_of(path) != before:
                raise DataError(f"data.train_files: {path} has changed while it was read. Start again once it is complete")
        self.train, self.validation, self.held_out = loaders.train, loaders.validation, loaders.held_out
        if is_scored_by_rules(self.config, load_algorithm(self.config.algorithm.name).roles(self.config)):
            scored = {"data.train_files": self.train if rows == "prompts" else None, "data.validation_files": self.validation}
            for key, loader in scored.items():
                if loader is not None and isinstance(loader.dataset, Prompts):
                    check_ground_truths(self.config.reward, loader.dataset.ground_truths(), key=key)
        num_validation = self.validation.num_prompts if self.validation else 0
        return DataSummary(self.train.num_prompts, self.train.num_batches_per_epoch, num_validation)

    @remote("rank_zero")
    def next_batch(self, step: int, count: int | None = None) -> Batch:
        """The next prompts of step `step`, counted from 1: `count` of them, by default all of a step. Steps are asked for in
        order."""
        assert self.train is not None, "DataWorker.open comes first"
        return self.train.next_batch(step, count)

    @remote("rank_zero")
    def validation_batch(self) -> Batch:
        """All validation prompts, the same with the same seeds at each call."""
        assert self.validation is not None, "there are no validation files"
        return self.validation.validation_batch()

    @remote("rank_zero")
    def held_out_batch(self) -> Batch:
        """All rows of `data.held_out_files`."""
        assert self.held_out is not None, "there are no held-out files"
        return self.held_out.validation_batch()

    @remote("rank_zero")
    def write_rows(self, rows: Batch, path: str) -> None:
        """Write texts and numbers of answered rows to a Parquet file."""
        write_rows(rows, path)

    @remote("rank_zero")
    def note_success(self, rates: Batch) -> None:
        """Prompts `prompt_id` were answered with success rates `rate`."""
        assert self.train is not None, "DataWorker.open comes first"
        self.train.note_success(rates["prompt_id"], rates["rate"])

    @remote("rank_zero")
    def save_under_way(self, folder: str, prompts: Batch, said: Batch | None) -> None:
        """Write which prompts are under way (numbers of their rows), and what their rows have said so far."""
        save_arrays(Path(folder, PROMPTS_FILE), prompts)
        if said is not None:
            save_arrays(Path(folder, SAID_FILE), said)

    @remote("rank_zero")
    def restore_under_way(self, folder: str) -> Batch:
        """The prompts that `save_under_way` wrote, read from the dataset again."""
        assert self.train is not None, "DataWorker.open comes first"
        return self.train.prompts_again(load_arrays(Path(folder, PROMPTS_FILE)))

    @remote("rank_zero")
    def said_under_way(self, folder: str) -> Batch:
        """What their rows had said; no rows where none had begun."""
        path = Path(folder, SAID_FILE)
        return load_arrays(path) if path.exists() else Batch()

    @remote("rank_zero")
    def save(self, folder: str) -> None:
        assert self.train is not None, "DataWorker.open comes first"
        Path(folder, STATE_FILE).write_text(json.dumps({**self.train.state_dict(), "files": self.files}))

    @remote("rank_zero")
    def restore(self, folder: str) -> None:
        assert self.train is not None, "DataWorker.open comes first"
        path = Path(folder, STATE_FILE)
        state = read_json(path, "how far the dataset was read")
        self._refuse_other_files(state.pop("files", self.files))
        drawn, num_rows = state.get("drawn"), state.get("num_rows")
        if not _are_counts(drawn) or not _are_counts(num_rows) or len(drawn) != len(num_rows):
            raise DamagedCheckpointError(
                f"{path} should hold how many prompts were drawn of how many, for each stream, and does not"
            )
        self.train.load_state_dict({**state, "drawn": drawn, "num_rows": num_rows})

    def _refuse_other_files(self, then: object) -> None:
        """The same number of rows in another file would be taken for the old ones, in silence."""
        if then == self.files:
            return
        old = then if isinstance(then, list) else []
        names = self.config.data.train_files
        if len(old) != len(names):
            found = f"the checkpoint was written with {len(old)} training files, and data.train_files names {len(names)}"
        else:
            first = next(number for number, file in enumerate(self.files) if file != old[number])
            found = f"data.train_files: {names[first]} has other content than the file that the checkpoint was written with"
        raise DataError(f"{found}. Give the files of then, in their order; where they lie does not matter")


def _are_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)
