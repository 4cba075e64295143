"""The one table of the batch's columns: what each holds, in which unit, and who writes it.

A column that is not in the table is allowed (a user's role may add its own); the table is what error messages and readers go
by. Per-row columns of numbers stay on the controller, all others where they were computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Per = Literal["row", "prompt token", "response token", "run of response tokens", "history"]


@dataclass(frozen=True)
class Column:
    """What a column holds."""

    per: Per
    dtype: Literal["int64", "int32", "float32", "float64", "bool", "object"]
    writer: str
    """Who writes it: the role and method to call when it is missing."""
    meaning: str
    """With its unit."""

    @property
    def is_number(self) -> bool:
        """Whether it holds one number per row, which is always at hand: `Batch.per_row`."""
        return self.per == "row" and self.dtype != "object"


COLUMNS = {
    # From the dataset: one row per prompt.
    "prompt": Column("prompt token", "int32", "data.loader", "Token ids of the prompt, chat template applied."),
    "prompt_text": Column("row", "object", "data.loader", "The prompt as text, chat template applied."),
    "messages": Column(
        "row", "object", "data.loader", "The prompt as chat messages; a prompt that is a string is one of role user."
    ),
    "ground_truth": Column("row", "object", "data.loader", "`reward_model.ground_truth` of the dataset."),
    "data_source": Column("row", "object", "data.loader", "`data_source` of the dataset."),
    "extra_info": Column("row", "object", "data.loader", "`extra_info` of the dataset, a dict."),
    "prompt_tokens": Column("row", "int64", "data.loader", "Number of prompt tokens."),
    "prompt_id": Column("row", "int64", "data.loader", "Row number of the prompt in the dataset."),
    "seed": Column("row", "int64", "data.loader", "Sampling seed of the prompt: a function of run seed, step, prompt."),
    "group": Column("row", "int64", "data.loader", "Rows with the same number answer the same prompt of this step."),
    "sample": Column("row", "int64", "data.loader, Batch.repeat", "Number of the response within its group, from 0."),
    "pair": Column(
        "row",
        "int64",
        "data.loader",
        "Rows with the same number are compared by a loss, chosen before rejected, and never divided over ranks.",
    ),
    "margin": Column("row", "float32", "data.loader", "By how much the chosen response should win, at least."),
    "position": Column(
        "row", "int64", "respond, the stream", "Number of the row while it is generated, unique among those under way."
    ),
    "call": Column("row", "int64", "the stream", "Which call of `generate` for the row it is, from 0: each samples anew."),
    "max_response_tokens": Column(
        "row", "int64", "data.loader", "Most response tokens of this row, from the dataset's column of that name."
    ),
    # From generation: one row per response.
    "response": Column("response token", "int32", "rollout.generate", "Token ids of the response, end of sequence included."),
    "response_text": Column("row", "object", "rollout.generate", "The response as text, without special tokens."),
    "response_tokens": Column("row", "int64", "rollout.generate", "Number of response tokens."),
    "truncated": Column("row", "bool", "rollout.generate", "True where the length limit ended the response."),
    "rollout_log_probs": Column("response token", "float32", "rollout.generate", "The engine's log-probabilities, in nats."),
    "temperature": Column("row", "float64", "rollout.generate", "With which the response was sampled; 0 is greedy."),
    "policy_versions": Column(
        "run of response tokens",
        "int64",
        "rollout.generate",
        "Pairs (version of the policy, number of tokens that it sampled), in their order. Version 0 has made no update.",
    ),
    "loss_mask": Column(
        "response token",
        "bool",
        "the algorithm or an environment",
        "1: sampled by the policy; 0: context only. None means all ones.",
    ),
    "loss_tokens": Column("row", "int64", "whoever writes loss_mask", "Number of tokens whose loss_mask is 1."),
    # From generation with an environment: one row per episode, whose `prompt` is that of `reset`.
    "conversation": Column("row", "object", "rollout.generate", "The episode's chat messages, of both sides."),
    "history_starts": Column(
        "history",
        "int64",
        "rollout.generate",
        "Response tokens before each new history: tokens behind were sampled without those before. Absent where none is.",
    ),
    "episode_reward": Column("row", "float32", "rollout.generate", "Sum of the environment's rewards."),
    "episode_failed": Column("row", "bool", "rollout.generate", "True where the environment failed."),
    "token_rewards": Column(
        "response token", "float32", "rollout.generate", "The environment's reward of each turn, at the turn's last token."
    ),
    # From scoring.
    "reward": Column("row", "float32", "reward.score", "The reward of the whole response."),
    "reward_failed": Column("row", "bool", "reward.score", "True where the reward function raised or timed out."),
    "reward_model_score": Column("row", "float32", "reward_model.score", "What the reward model reads at the end."),
    "teacher_log_probs": Column("response token", "float32", "teacher.log_probs", "Under the teacher, in nats."),
    "cost_model_score": Column("row", "float32", "cost_model.score", "What the cost model reads at the end."),
    "log_probs": Column(
        "response token", "float32", "actor.log_probs", "Under the policy before this step's updates, in nats."
    ),
    "reference_log_probs": Column("response token", "float32", "reference.log_probs", "Under the reference policy, in nats."),
    "values": Column("response token", "float32", "critic.values", "Expected return before the token, in reward units."),
    # From the estimate of advantages.
    "advantages": Column("response token", "float32", "critic.compute(TokenAdvantages)", "Advantage of each token."),
    "returns": Column("response token", "float32", "critic.compute(TokenAdvantages)", "Target of the critic, in reward units."),
    "kl": Column("row", "float32", "critic.compute(TokenAdvantages)", "Mean KL to the reference per token, in nats."),
    "advantage": Column("row", "float32", "the algorithm", "One advantage for all tokens of the response."),
}


def writer_of(name: str) -> str:
    """Who should have written column `name`, as the end of an error message."""
    if name in COLUMNS:
        return f"it is written by {COLUMNS[name].writer}"
    return "it is not in hybridflow/columns.py, so a role or function of your own must write it"
