"""The rollout role without Ray: from prompts to columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybridflow.batch import Batch, Ragged
from hybridflow.config.schema import Config, DataConfig, LoopConfig, ModelConfig, RolloutConfig, ValidationConfig
from hybridflow.errors import ConfigError, EngineError
from hybridflow.parallel.layout import Layout
from hybridflow.planner.decisions import resolved
from hybridflow.rollout.seeds import mixed_seed
from hybridflow.workers.base import RankContext
from hybridflow.workers.rollout import RolloutWorker, _seeds, engine_spec, training_sampling, validation_sampling
from tests.toy import make_tiny_model

CONTEXT = RankContext(role="rollout", rank=0, layout=Layout(), device=torch.device("cpu"))


def config_of(model: str) -> Config:
    return Config(
        model=ModelConfig(path=model),
        data=DataConfig(max_prompt_tokens=32, max_response_tokens=20),
        rollout=RolloutConfig(engine="torch", max_num_seqs=16),
    )


@pytest.fixture(scope="module")
def worker(tiny_model: str) -> Iterator[RolloutWorker]:
    worker = RolloutWorker(config_of(tiny_model), CONTEXT)
    yield worker
    worker.close()


def prompts(count: int = 5, *, longest: int = 20) -> Batch:
    random = np.random.default_rng(0)
    rows = [random.integers(4, 64, random.integers(1, longest + 1)) for _ in range(count)]
    batch = Batch.from_columns({"prompt": Ragged.from_rows(rows, np.int32)})
    return batch.with_columns(
        seed=np.arange(count, dtype=np.int64) + 10, group=np.arange(count), call=np.zeros(count, np.int64)
    )


def rows_of(batch: Batch, name: str = "response") -> list[list[float]]:
    return [row.tolist() for row in batch.tokens(name)]


def test_generate_returns_the_new_columns_only(worker: RolloutWorker) -> None:
    responses = worker.generate(prompts())
    told = {"response", "response_text", "response_tokens", "truncated", "temperature", "policy_versions"}
    assert set(responses.names) == {*told, "rollout_log_probs"}
    assert len(responses) == 5


def test_columns_have_the_dtypes_of_the_table(worker: RolloutWorker) -> None:
    responses = worker.generate(prompts())
    assert responses.tokens("response").values.dtype == np.int32
    assert responses.tokens("rollout_log_probs").values.dtype == np.float32
    assert responses["response_tokens"].dtype == np.int64
    assert responses["truncated"].dtype == np.bool_


def test_lengths_and_log_probs_go_with_the_tokens(worker: RolloutWorker) -> None:
    responses = worker.generate(prompts())
    lengths = responses.tokens("response").lengths
    assert lengths.tolist() == responses["response_tokens"].tolist()
    assert lengths.tolist() == responses.tokens("rollout_log_probs").lengths.tolist()
    assert (responses.tokens("rollout_log_probs").values <= 0).all()


def test_text_has_no_special_tokens_and_truncation_is_marked(worker: RolloutWorker, tiny_model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    responses = worker.generate(prompts(40))
    texts = responses.objects("response_text")
    assert texts == [tokenizer.decode(row, skip_special_tokens=True) for row in rows_of(responses)]
    ends = [row[-1] == tokenizer.eos_token_id for row in rows_of(responses)]
    assert responses["truncated"].tolist() == [not end for end in ends]
    assert any(ends) and not all(ends)


def test_a_row_does_not_depend_on_where_it_stands(worker: RolloutWorker) -> None:
    batch = prompts().repeat(3)
    whole = rows_of(worker.generate(batch))
    order = np.random.default_rng(1).permutation(len(batch))
    assert rows_of(worker.generate(batch.select(order))) == [whole[row] for row in order]
    assert rows_of(worker.generate(batch.select([7]))) == [whole[7]]


def test_samples_of_a_prompt_differ(worker: RolloutWorker) -> None:
    rows = rows_of(worker.generate(prompts(1).repeat(8), sampling=replace(training_sampling(worker.config), ignore_eos=True)))
    assert len({tuple(row) for row in rows}) == 8


def test_another_seed_column_gives_other_responses(worker: RolloutWorker) -> None:
    batch = prompts()
    other = batch.with_columns(seed=batch["seed"] + 1000)
    assert rows_of(worker.generate(batch)) != rows_of(worker.generate(other))


def test_a_second_call_in_a_step_samples_anew_and_a_second_run_repeats_it(worker: RolloutWorker) -> None:
    batch, expected_first = prompts().without(["call"]), rows_of(worker.generate(prompts()))
    worker.begin_step(1, 2)
    first, second = (rows_of(worker.generate(batch)) for _ in range(2))
    worker.begin_step(2, 2)
    assert [rows_of(worker.generate(batch)) for _ in range(2)] == [first, second]
    assert first == expected_first, "the first call has number 0"
    assert all(one != other for one, other in zip(first, second, strict=True))


def test_a_column_says_which_call_it_is_and_is_not_counted(worker: RolloutWorker) -> None:
    batch = prompts().without(["call"])
    worker.begin_step(1, 1)
    _, second = (rows_of(worker.generate(batch)) for _ in range(2))
    worker.begin_step(1, 1)
    assert rows_of(worker.generate(batch.with_columns(call=np.ones(len(batch), np.int64)))) == second
    assert rows_of(worker.generate(batch)) == rows_of(worker.generate(prompts())), "the other one was not counted"


def test_seeds_of_the_first_call_are_those_of_prompt_and_sample() -> None:
    batch = prompts(3).repeat(2)
    assert _seeds(batch).tolist() == mixed_seed(batch["seed"], batch["sample"]).tolist()
    later = batch.with_columns(call=np.arange(1, 7))
    assert len({*_seeds(batch).tolist(), *_seeds(later).tolist()}) == 12


def test_a_row_may_have_a_limit_of_its_own_below_the_common_one(worker: RolloutWorker) -> None:
    endless = replace(training_sampling(worker.config), ignore_eos=True)
    whole = rows_of(worker.generate(prompts(4), sampling=endless))
    limits = np.array([1, 7, 20, np.iinfo(np.int64).max])
    limited = worker.generate(prompts(4).with_columns(max_response_tokens=limits), sampling=endless)
    assert limited["response_tokens"].tolist() == [1, 7, 20, 20]
    assert rows_of(limited) == [row[:limit] for row, limit in zip(whole, limits.tolist(), strict=True)]
    assert limited["truncated"].all()


def test_rows_say_with_which_temperature_and_which_policy_they_were_sampled(worker: RolloutWorker) -> None:
    responses = worker.generate(prompts(), sampling=replace(training_sampling(worker.config), temperature=0.7))
    assert responses["temperature"].tolist() == [0.7] * 5
    expected = [[worker.rows.version, count] for count in responses["response_tokens"].tolist()]
    assert rows_of(responses, "policy_versions") == expected


def test_no_rows_give_no_rows(worker: RolloutWorker) -> None:
    responses = worker.generate(prompts().select([]))
    assert len(responses) == 0 and "response" in responses.names


def test_log_probs_are_left_out_where_not_asked_for(worker: RolloutWorker) -> None:
    responses = worker.generate(prompts(), sampling=validation_sampling(worker.config))
    assert "rollout_log_probs" not in responses.names


def test_greedy_validation_gives_every_sample_the_same_response(worker: RolloutWorker) -> None:
    rows = rows_of(worker.generate(prompts(1).repeat(4), sampling=validation_sampling(worker.config)))
    assert len({tuple(row) for row in rows}) == 1


def test_loaded_weights_are_what_generates(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = make_tiny_model(tmp_path_factory.mktemp("other"), seed=1)
    worker, expected = RolloutWorker(config_of(tiny_model), CONTEXT), RolloutWorker(config_of(other), CONTEXT)
    worker.load_weights(AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32).state_dict().items())
    assert rows_of(worker.generate(prompts())) == rows_of(expected.generate(prompts()))
    worker.close()
    expected.close()


def test_sleep_and_wake_change_nothing(worker: RolloutWorker) -> None:
    before = rows_of(worker.generate(prompts()))
    worker.sleep()
    worker.wake_up()
    assert rows_of(worker.generate(prompts())) == before


def test_an_overlong_prompt_is_named(worker: RolloutWorker) -> None:
    with pytest.raises(EngineError, match=r"request 0 has 40 prompt tokens.*max_prompt_tokens"):
        worker.generate(prompts(1, longest=1).join(Batch.from_columns({"prompt": Ragged.from_rows([[5] * 40], np.int32)})))


def test_sampling_comes_from_the_configuration() -> None:
    config = Config(
        data=DataConfig(max_response_tokens=77),
        rollout=RolloutConfig(
            temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, stop=("\n",), stop_token_ids=(3,), ignore_eos=True
        ),
        validation=ValidationConfig(temperature=0.2, top_p=0.8, top_k=4),
    )
    training, validation = training_sampling(config), validation_sampling(config)
    assert (training.temperature, training.top_p, training.top_k, training.min_p) == (0.7, 0.9, 5, 0.1)
    assert (validation.temperature, validation.top_p, validation.top_k, validation.min_p) == (0.2, 0.8, 4, 0.0)
    assert training.max_tokens == validation.max_tokens == 77
    assert training.stop == validation.stop == ("\n",)
    assert training.log_probs and not validation.log_probs
    assert training.ignore_eos and not validation.ignore_eos


def test_tensor_ranks_share_an_engine() -> None:
    config = Config(rollout=RolloutConfig(tensor_parallel=2))
    assert RolloutWorker.layout_of(config, 8) == Layout(data=4, tensor=2)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda", "bfloat16")])
def test_the_dtype_follows_the_device(tiny_model: str, device: str, dtype: str) -> None:
    context = RankContext(role="rollout", rank=0, layout=Layout(), device=torch.device(device))
    spec = engine_spec(resolved(config_of(tiny_model)), context)
    assert spec.dtype == dtype
    assert spec.max_model_tokens == 52


@pytest.mark.parametrize(("staleness", "most_rows"), [(0, 16), (1, 32)])
def test_an_engine_knows_how_many_rows_come_at_once(tiny_model: str, staleness: int, most_rows: int) -> None:
    config = resolved(replace(config_of(tiny_model), loop=LoopConfig(max_staleness=staleness)))
    config = replace(config, data=replace(config.data, prompts_per_step=16, validation_files=()))
    four = RankContext(role="rollout", rank=0, layout=Layout(data=4), device=CONTEXT.device)
    # 16 prompts with 2 rows each, counted twice since they are not even, on four engines; ahead of training as many again.
    assert engine_spec(config, four).most_rows == most_rows
    validated = replace(config, data=replace(config.data, validation_files=("any.parquet",)))
    assert engine_spec(validated, four).most_rows is None


def test_an_engine_of_the_wrong_class_is_refused(tiny_model: str) -> None:
    config = replace(config_of(tiny_model), rollout=RolloutConfig(engine="collections:OrderedDict"))
    with pytest.raises(ConfigError, match="is no subclass of"):
        RolloutWorker(config, CONTEXT)


def test_a_cache_too_small_for_one_response_is_refused(tiny_model: str) -> None:
    config = config_of(tiny_model)
    config = replace(config, rollout=replace(config.rollout, cpu_cache_gib=1e-6))
    with pytest.raises(EngineError, match="cpu_cache_gib"):
        RolloutWorker(config, CONTEXT)


def test_a_small_cache_changes_no_response(worker: RolloutWorker, tiny_model: str) -> None:
    config = config_of(tiny_model)
    # 52 tokens of 2 layers x (key, value) x 2 heads x 16 x 4 bytes are 26 KiB a row: room for 3 rows at once.
    config = replace(config, rollout=replace(config.rollout, cpu_cache_gib=80 / 2**20))
    small = RolloutWorker(config, CONTEXT)
    assert rows_of(small.generate(prompts(20))) == rows_of(worker.generate(prompts(20)))
    small.close()
