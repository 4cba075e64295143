"""Does a model compute here what it computes in transformers? Two short rows, packed as in training, against the same weights
one row at a time through transformers' own attention.

A model is believed by this and by no list of names: whatever a family of models does that packed rows would get wrong (states
that run on from row to row, scaled logits, dropout that stays on) shows in its numbers. T tokens, R response tokens, H hidden
channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hybridflow.batch import Ragged
from hybridflow.errors import ModelError, listed
from hybridflow.models.heads import ValueModel
from hybridflow.models.packing import Packed, pack, to_device
from hybridflow.models.policy import PolicyModel
from hybridflow.parallel import fsdp
from hybridflow.parallel.finite import largest, not_finite

OWN_ATTENTION = "eager"
"""The attention that every model of transformers has."""
ROWS = ((4, 9), (3, 5))
"""Prompt and response tokens. The second row is the one that could see the first."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.2}
"""Mean |difference| by what layers compute in: of log-probabilities in nats, of hidden states in units of their own size. In
bfloat16 kernels alone differ by 0.02, by up to 0.1 where distributions are very uneven."""
FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, ImportError)
"""What a model raises whose forward is called in a way that it was not made for."""


def text_rows(config: PretrainedConfig, lengths: tuple[int, ...]) -> list[npt.NDArray[np.int64]]:
    """Rows of random tokens without those that have a meaning of their own, which some models treat unlike text."""
    text = config.get_text_config()
    settings = {**text.to_dict(), **config.to_dict()}
    special = [found for name, found in settings.items() if name.endswith("_token_id") and isinstance(found, int)]
    generator, usable = np.random.default_rng(0), np.setdiff1d(np.arange(text.vocab_size), special)
    return [generator.choice(usable, length) for length in lengths]


@contextmanager
def own_attention(model: nn.Module) -> Iterator[None]:
    """A block in which `model` takes its attention from transformers."""
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = OWN_ATTENTION
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def own_log_probs(causal_lm: nn.Module, tokens_T: torch.Tensor) -> torch.Tensor:
    """Log-probabilities, in nats, of all tokens of a row but the first, as transformers gives them: shape [T - 1], float32."""
    logits_TV = causal_lm(input_ids=tokens_T[None], use_cache=False).logits[0, :-1].float()
    return torch.log_softmax(logits_TV, -1).gather(1, tokens_T[1:, None])[:, 0]


def check(model: PolicyModel | ValueModel, *, path: str, device: torch.device, dtype: torch.dtype) -> float:
    """The mean difference between both ways, of a sharded model that computes in `dtype`. All ranks call this.

    A policy is compared by log-probabilities; a value model by the states that it reads values from, since a new one expects
    nothing.

    Raises:
        ModelError: it is above the tolerance, or the model does not compute on packed rows at all.
    """
    part = model.causal_lm if isinstance(model, PolicyModel) else model.backbone
    assert isinstance(part, PreTrainedModel), "policies and value models are built on models of transformers"
    rows = text_rows(part.config, tuple(sum(row) for row in ROWS))
    was_training = model.training
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), computing(path, part, "on packed rows"):
            found_R, expected_R = _both_ways(model, rows, device)
        difference = _over_ranks(found_R, expected_R)
    finally:
        model.train(was_training)
        fsdp.drop_gathered(model)
    if not difference <= TOLERANCE[dtype]:  # not a number counts as different
        if bad := not_finite(largest(part.named_parameters())):
            raise ModelError(
                f"{path!r} ({_name(part)}) holds weights that are not finite numbers: {listed(bad)}. Use another model"
            )
        raise ModelError(
            f"{path!r} ({_name(part)}) computes on packed rows something else than transformers does on one row at a time: "
            f"{difference:.3g} of difference on average, {TOLERANCE[dtype]:g} is allowed. It would be trained wrongly: its "
            "layers carry something from row to row, or change what the output layer gives. Use another model"
        )
    return difference


@contextmanager
def computing(path: str, model: nn.Module, how: str) -> Iterator[None]:
    """A block in which a model computes in another way than transformers has it compute.

    Raises:
        ModelError: it cannot. Memory and connections that give out are no fault of the model's.
    """
    try:
        yield
    except (torch.OutOfMemoryError, dist.DistError):
        raise
    except FAILURES as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelError(f"{path!r} ({_name(model)}) does not compute {how}: {reason:.300}. Use another model") from error


def _both_ways(
    model: PolicyModel | ValueModel, rows: list[npt.NDArray[np.int64]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model gives for each response token of this rank, packed, and one row at a time."""
    prompts, responses = (
        Ragged.from_rows([row[part] for row, part in zip(rows, parts, strict=True)], np.int32)
        for parts in ([slice(prompt) for prompt, _ in ROWS], [slice(prompt, None) for prompt, _ in ROWS])
    )
    ranks = model.sequence_group
    number, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    packed = pack(prompts, responses, device, sequence_rank=number, sequence_size=size)
    model.train()  # as in updates: what is dropped or shaken only there shows
    found = model(packed)[0] if isinstance(model, PolicyModel) else _states(model, packed)
    model.eval()
    expected = []
    # The outer weights are still gathered from the first pass.
    with own_attention(model):
        for row, (num_prompt, _) in zip(rows, ROWS, strict=True):
            tokens_T = to_device(row, device)
            if isinstance(model, PolicyModel):
                expected.append(own_log_probs(model.causal_lm, tokens_T)[num_prompt - 1 :])
            else:
                states_TH = model.backbone(input_ids=tokens_T[None], use_cache=False).last_hidden_state[0]
                expected.append(states_TH[num_prompt - 1 : -1].float())
    whole = torch.cat(expected)
    if isinstance(model, ValueModel):  # log-probabilities are gathered by the model
        whole = torch.split(whole, list(packed.rank_sizes))[number]
    return found.float(), whole


def _states(model: ValueModel, packed: Packed) -> torch.Tensor:
    """What the value head is given: shape [R, H]."""
    given: list[torch.Tensor] = []
    hook = model.value_head.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    try:
        model(packed)
    finally:
        hook.remove()
    return given[0]


def _over_ranks(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The mean difference on the rank where it is largest; of states, which have H channels, in units of their size."""
    size = expected.square().mean().sqrt() if expected.ndim > 1 else expected.new_ones(())
    worst = ((found - expected).abs().mean() / size).nan_to_num(nan=torch.inf)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)


def _name(model: nn.Module) -> str:
    return type(model).__name__.removeprefix("FSDP")
