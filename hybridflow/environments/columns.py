"""Episodes as rows of a batch: from the dataset's columns, and to those of generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from hybridflow.batch import Array, Batch, Ragged, ShardColumn
from hybridflow.config.schema import EnvironmentConfig
from hybridflow.environments.base import Message, Row
from hybridflow.environments.episode import Episode
from hybridflow.rollout.under_way import RowUnderWay


def episodes_of(batch: Batch, rows: Sequence[RowUnderWay], config: EnvironmentConfig) -> list[RowUnderWay]:
    """The rows as episodes; those that had begun before say it again."""
    names = ("messages", "ground_truth", "data_source", "extra_info")
    samples = batch["sample"] if "sample" in batch else np.zeros(len(batch), np.int64)
    given = [
        Row(
            messages=list(cast(Sequence[Message], messages)),
            ground_truth=ground_truth,
            data_source=str(data_source),
            extra_info=cast(dict[str, object], extra_info),
            seed=seed,
            sample=sample,
        )
        for messages, ground_truth, data_source, extra_info, seed, sample in zip(
            *map(batch.objects, names), batch["seed"].tolist(), samples.tolist(), strict=True
        )
    ]
    episodes = [
        Episode(row.number, row.prompt, row.sampling, row.seed, given=one, config=config)
        for row, one in zip(rows, given, strict=True)
    ]
    if "ended" in batch:
        columns = map(batch.tokens, ("response", "rollout_log_probs", "policy_versions", "loss_mask"))
        for episode, ended, tokens, log_probs, versions, mask in zip(episodes, batch["ended"].tolist(), *columns, strict=True):
            reason = "stop" if ended else None
            episode.go_on_from(tokens, log_probs, versions, finish_reason=reason, mask=mask.astype(np.bool_))
    return list(episodes)


def episode_columns(episodes: Sequence[Episode], config: EnvironmentConfig) -> Batch:
    """What generation adds for episodes: the `prompt` of `reset`, `loss_mask`, `episode_reward`, `conversation`, numbers of
    the environment as `environment/NAME`, and with `rewards: turn` `token_rewards`."""
    mask = Ragged.from_rows([episode.mask for episode in episodes], np.bool_)
    prompts = Ragged.from_rows([episode.prompt for episode in episodes], np.int32)
    columns: dict[str, Array | ShardColumn] = {
        "prompt": prompts,
        "prompt_text": [episode.prompt_text for episode in episodes],
        "conversation": [[*episode.past, *episode.said] for episode in episodes],
        "history_starts": Ragged.from_rows([episode.history_starts for episode in episodes], np.int64),
        "loss_mask": mask,
        "prompt_tokens": prompts.lengths,
        "loss_tokens": np.array([episode.mask.sum() for episode in episodes], np.int64),
        "episode_reward": np.array([episode.reward for episode in episodes], np.float32),
        "episode_failed": np.array([episode.failure is not None for episode in episodes], np.bool_),
        "environment/histories": np.array([1 + len(episode.history_starts) for episode in episodes], np.float32),
        "environment/turns": np.array([episode.num_turns for episode in episodes], np.float32),
    }
    if config.rewards == "turn":
        columns["token_rewards"] = _token_rewards(episodes, mask)
    names = dict.fromkeys(name for episode in episodes for name in episode.metrics)
    for name in names:
        numbers = [episode.metrics.get(name, np.nan) for episode in episodes]
        columns[f"environment/{name}"] = np.array(numbers, np.float32)
    return Batch.from_columns(columns)


def _token_rewards(episodes: Sequence[Episode], mask: Ragged) -> Ragged:
    """Each turn's reward at the turn's last token."""
    values = np.zeros(len(mask.values), np.float32)
    for episode, offset in zip(episodes, mask.offsets[:-1].tolist(), strict=True):
        if episode.failure is None:
            for end, reward in episode.turn_rewards:
                values[offset + end - 1] += reward
    return Ragged(values, mask.offsets)
