"""Which prompts each step gets: everything once per epoch, the same again after a resume."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hybridflow.batch import Array, Batch, Ragged, ShardColumn
from hybridflow.columns import COLUMNS
from hybridflow.config.schema import Config, DataConfig, ModelConfig, RunConfig, ValidationConfig
from hybridflow.data.chat import load_tokenizer
from hybridflow.data.loader import PromptLoader, build_loaders, prompt_seed, read_rows
from hybridflow.errors import DataError


class Numbers:
    """A dataset whose rows are their own numbers."""

    def __init__(self, *rows_per_file: int):
        self.rows_per_file = rows_per_file

    def __len__(self) -> int:
        return sum(self.rows_per_file)

    def columns(self, rows: npt.NDArray[np.int64]) -> dict[str, Array | ShardColumn]:
        return {"prompt": Ragged.from_rows([[row] for row in rows], np.int32), "prompt_id": rows}


def loader(*rows_per_file: int, prompts_per_step: int = 4, seed: int = 0, weights: Sequence[float] = ()) -> PromptLoader:
    return PromptLoader(Numbers(*rows_per_file), prompts_per_step=prompts_per_step, seed=seed, weights=weights)


def drawn(source: PromptLoader, steps: range) -> list[int]:
    return [int(row) for step in steps for row in source.next_batch(step)["prompt_id"]]


def test_an_epoch_has_every_prompt_once() -> None:
    assert sorted(drawn(loader(12), range(1, 4))) == list(range(12))


def test_each_epoch_has_its_own_order() -> None:
    order = drawn(loader(12), range(1, 7))
    assert sorted(order[12:]) == list(range(12))
    assert order[:12] != order[12:]


def test_the_tail_of_an_epoch_starts_the_next_step() -> None:
    # 10 prompts, 4 per step: step 3 takes the last two of the first epoch and two of the second; 5 steps are 2 epochs.
    order = drawn(loader(10), range(1, 6))
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))


def test_a_step_may_be_larger_than_the_data() -> None:
    assert Counter(drawn(loader(3, prompts_per_step=9), range(1, 2))) == {0: 3, 1: 3, 2: 3}


def test_the_order_is_a_function_of_the_run_seed() -> None:
    assert drawn(loader(50), range(1, 9)) == drawn(loader(50), range(1, 9))
    assert drawn(loader(50), range(1, 9)) != drawn(loader(50, seed=1), range(1, 9))


def test_without_shuffling_rows_come_in_file_order() -> None:
    source = PromptLoader(Numbers(3, 3), prompts_per_step=4, seed=0, shuffle=False)
    assert drawn(source, range(1, 3)) == [0, 1, 2, 3, 4, 5, 0, 1]


@pytest.mark.parametrize("weights", [(), (0.7, 0.3)])
def test_a_resumed_loader_continues_where_it_was(weights: Sequence[float]) -> None:
    whole = drawn(loader(11, 7, weights=weights), range(1, 11))
    first, second = loader(11, 7, weights=weights), loader(11, 7, weights=weights)
    before = drawn(first, range(1, 6))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + drawn(second, range(6, 11)) == whole


def test_other_data_than_the_checkpoint_was_written_with_is_refused() -> None:
    with pytest.raises(DataError, match=r"written with \[10\] prompts .*now \[12\]"):
        loader(12).load_state_dict(loader(10).state_dict())


def test_weights_are_the_shares_of_every_step() -> None:
    # 0.75 and 0.25 of 8 prompts: 6 of file 0 (rows 0 to 99) and 2 of file 1 in each step.
    source = loader(100, 10, prompts_per_step=8, weights=(3, 1))
    for step in range(1, 30):
        assert sum(row < 100 for row in drawn(source, range(step, step + 1))) == 6


def test_weights_that_do_not_divide_a_step_hold_over_steps() -> None:
    # A tenth of 40 x 7 prompts is 28, to within one prompt at any time.
    order = drawn(loader(100, 100, prompts_per_step=7, weights=(0.9, 0.1)), range(1, 41))
    assert abs(sum(row >= 100 for row in order) - 28) <= 1


def test_a_small_file_with_weight_starts_over_by_itself() -> None:
    order = drawn(loader(1000, 4, prompts_per_step=8, weights=(1, 1)), range(1, 3))
    assert Counter(row for row in order if row >= 1000) == {1000: 2, 1001: 2, 1002: 2, 1003: 2}


def test_a_file_with_a_share_and_no_prompts_is_refused() -> None:
    with pytest.raises(DataError, match=r"file 1 of data.train_files has no prompts left"):
        loader(5, 0, weights=(1, 1))


def test_seeds_are_a_function_of_run_step_and_prompt() -> None:
    seeds = {prompt_seed(run, step, prompt) for run in range(3) for step in range(3) for prompt in range(3)}
    assert len(seeds) == 27
    assert all(0 <= seed < 2**63 for seed in seeds)
    batch = loader(12, seed=5).next_batch(2)
    assert batch["seed"].tolist() == [prompt_seed(5, 2, prompt) for prompt in batch["prompt_id"].tolist()]


def test_copies_of_a_prompt_in_one_step_have_their_own_seeds() -> None:
    assert len(set(loader(1, prompts_per_step=4).next_batch(1)["seed"].tolist())) == 4


def test_groups_count_the_prompts_of_a_step() -> None:
    batch = loader(12).next_batch(3)
    assert batch["group"].tolist() == [0, 1, 2, 3]
    assert batch["sample"].tolist() == [0, 0, 0, 0]


def test_validation_has_every_prompt_once_with_seeds_that_stay() -> None:
    source = loader(7)
    before = source.validation_batch()
    source.next_batch(1)
    assert before["prompt_id"].tolist() == list(range(7))
    assert before["seed"].tolist() == source.validation_batch()["seed"].tolist()


def test_an_epoch_counts_whole_steps() -> None:
    assert loader(11).num_batches_per_epoch == 2
    assert loader(3).num_batches_per_epoch == 1


def write(path: Path, num_rows: int, **columns: object) -> str:
    row = {"prompt": "1+1=", "reward_model": {"ground_truth": "2"}, "data_source": "x", **columns}
    pq.write_table(pa.Table.from_pylist([row] * num_rows), path)
    return str(path)


def config(tiny_model: str, **data: object) -> Config:
    return Config(
        model=ModelConfig(path=tiny_model),
        data=DataConfig(prompts_per_step=2, **data),
        run=RunConfig(seed=3),
        validation=ValidationConfig(max_prompts=2),
    )


def dtype_of(batch: Batch, name: str) -> str:
    if name in batch.per_row:
        return str(batch[name].dtype)
    return str(batch.tokens(name).values.dtype) if COLUMNS[name].per != "row" else "object"


def test_every_column_is_as_the_table_says(tiny_model: str, tmp_path: Path) -> None:
    run = config(tiny_model, train_files=(write(tmp_path / "a.parquet", 3, response="#### 2"),))
    loaders = build_loaders(run, load_tokenizer(run), "responses")
    train, validation = loaders.train, loaders.validation
    batch = train.next_batch(1)
    assert validation is None
    assert all(COLUMNS[name].is_number == (name in batch.per_row) for name in batch.names)
    assert {name: dtype_of(batch, name) for name in batch.names} == {name: COLUMNS[name].dtype for name in batch.names}


def test_validation_takes_the_first_prompts_and_needs_no_responses(tiny_model: str, tmp_path: Path) -> None:
    files = write(tmp_path / "a.parquet", 3, response="#### 2"), write(tmp_path / "b.parquet", 5)
    run = config(tiny_model, train_files=files[:1], validation_files=files[1:])
    validation = build_loaders(run, load_tokenizer(run), "responses").validation
    assert validation is not None
    assert len(validation.validation_batch()) == 2


def test_a_response_ends_with_the_end_of_sequence_unless_it_is_cut(tiny_model: str, tmp_path: Path) -> None:
    run = config(tiny_model, train_files=(write(tmp_path / "a.parquet", 2, response="12345"),), max_response_tokens=6)
    tokenizer = load_tokenizer(run)
    whole = build_loaders(run, tokenizer, "responses").train.next_batch(1)
    assert whole["response_tokens"].tolist() == [6, 6]
    assert whole.tokens("response")[0][-1] == tokenizer.eos_token_id
    assert not whole["truncated"].any()
    cut_run = config(tiny_model, train_files=run.data.train_files, max_response_tokens=5)
    cut = build_loaders(cut_run, tokenizer, "responses").train.next_batch(1)
    assert tokenizer.decode(cut.tokens("response")[0].tolist()) == "12345"
    assert cut["truncated"].all()


def test_a_column_of_limits_is_nothing_to_rows_with_responses(tiny_model: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", 2, response="12345", max_response_tokens=1)
    batch = build_loaders(run := config(tiny_model, train_files=(file,)), load_tokenizer(run), "responses").train.next_batch(1)
    assert batch["response_tokens"].tolist() == [6, 6]


def test_responses_need_neither_ground_truth_nor_source(tiny_model: str, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"prompt": "a", "response": "b"}] * 2), tmp_path / "a.parquet")
    run = config(tiny_model, train_files=(str(tmp_path / "a.parquet"),))
    batch = build_loaders(run, load_tokenizer(run), "responses").train.next_batch(1)
    assert batch.objects("ground_truth") == [None, None]


def test_a_missing_response_column_is_named(tiny_model: str, tmp_path: Path) -> None:
    run = config(tiny_model, train_files=(write(tmp_path / "a.parquet", 3),))
    with pytest.raises(DataError, match="column 'response' is missing"):
        build_loaders(run, load_tokenizer(run), "responses")


def test_a_null_response_is_told_with_the_key_of_its_files(tiny_model: str, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"prompt": "a", "response": "b"}, {"prompt": "c", "response": None}]), tmp_path / "a")
    run = config(tiny_model, train_files=(str(tmp_path / "a"),))
    dataset = read_rows(run, run.data.train_files, load_tokenizer(run), "responses", key="algorithm.pretraining_files")
    with pytest.raises(DataError, match=r"row 1 of algorithm\.pretraining_files: column 'response' is null"):
        dataset.columns(np.arange(2))
