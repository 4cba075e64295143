"""What actor and critic have in common: a model with its optimizer, and one update on a batch."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from hybridflow.batch import Batch
from hybridflow.checkpoint.sharded import check_same_parts, load_sharded, save_sharded
from hybridflow.config.schema import TrainingConfig
from hybridflow.metrics import Metric, Metrics
from hybridflow.models.build import named_tensors, parameters_by_name
from hybridflow.models.heads import ValueModel
from hybridflow.models.packing import to_device
from hybridflow.models.policy import PolicyModel
from hybridflow.ops.losses import Loss, TokenBatch
from hybridflow.ops.reduce import TokenMetric, accumulate, to_metrics, token_weights
from hybridflow.parallel import fsdp
from hybridflow.parallel.finite import largest
from hybridflow.workers.base import RankContext
from hybridflow.workers.finite import SkippedUpdates, WeightCheck, WhySkipped, why_skipped
from hybridflow.workers.microbatches import Microbatch, Microbatches
from hybridflow.workers.model_core import CPU, ModelCore, Outputs
from hybridflow.workers.utilisation import flops_per_token, peak_flops

logger = logging.getLogger("hybridflow")

Observe = Callable[[Microbatches, list[tuple[Microbatch, Outputs]]], dict[str, TokenMetric]]
"""Measures what the model gave in an update, microbatch by microbatch, without waiting for the device."""


def learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """The rate of step `step` of `total_steps`, from 1.

    It reaches the peak at the last step of the warm-up. The step after has the peak still, and from there linear and cosine
    schedules fall so that a step after the last one would have the minimum.

    Example:
        >>> config = TrainingConfig(learning_rate=1.0, warmup_steps=2, schedule="linear", min_learning_rate_ratio=0.0)
        >>> [learning_rate(config, step, total_steps=6) for step in range(1, 7)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    warmup_steps = config.warmup_steps or int(config.warmup_ratio * total_steps)
    if step <= warmup_steps:
        return config.learning_rate * step / warmup_steps
    progress = (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps)
    match config.schedule:
        case "constant":
            share = 1.0
        case "linear":
            share = 1.0 - progress
        case "cosine":
            share = 0.5 * (1.0 + math.cos(math.pi * progress))
    floor = 1.0 if config.schedule == "constant" else config.min_learning_rate_ratio
    return config.learning_rate * (floor + (1.0 - floor) * share)


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that are trained, its state allocated at once, so that memory is known from the start."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.learning_rate, betas=config.adam_betas, fused=True
    )
    for parameter in trained:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return optimizer


class TrainingCore(ModelCore):
    """A model with its optimizer and its learning rate."""

    def __init__(
        self,
        model: PolicyModel | ValueModel,
        config: TrainingConfig,
        context: RankContext,
        *,
        temperature: float = 1.0,
        reads_rows: bool = False,
        max_skipped_updates: int | None = 5,
    ):
        super().__init__(model, config, context, temperature=temperature, reads_rows=reads_rows)
        self.config = config
        self.optimizer = make_optimizer(model, config)
        self.has_adapters = any(".lora_" in name for name, _ in model.named_parameters())
        self.learning_rate = config.learning_rate
        self.num_updates = 0
        """Calls of `update`."""
        self.step = self.total_steps = self.first_step = 0
        self.moments = WeightCheck(context, config=config, most=torch.finfo(torch.float32).max)
        self.skipped = SkippedUpdates(context, config=config, most=max_skipped_updates)
        self.peak_flops, self.flops_per_token = peak_flops(context.device), flops_per_token(model)
        self.offload()

    def begin_step(self, step: int, total_steps: int) -> None:
        """Set the learning rate of the updates that follow."""
        self.first_step = self.first_step or step
        self.step, self.total_steps = step, total_steps
        self.learning_rate = learning_rate(self.config, step, total_steps)

    def end_run(self) -> None:
        """What a resumed run did before is taken to be as many updates a step as this process has made.

        Raises:
            DivergenceError: the run ends with half of its updates, two or more, skipped.
        """
        steps_here = self.step - self.first_step + 1
        self.skipped.raise_if_most_of_the_run(num_updates=round(self.num_updates * self.total_steps / steps_here))

    @torch.no_grad()
    def measure(self, batch: Batch, loss: Loss, forward: Callable[[Microbatch], Outputs]) -> Metrics:
        """The metrics that `update` would give of `loss`, of a model that stays as it is."""
        microbatches = self.microbatches(batch, self.config.forward_tokens)
        metrics: dict[str, TokenMetric] = {}
        with self.on_device():
            self.model.eval()
            for microbatch in microbatches:
                outputs = forward(microbatch)
                if microbatch.lengths_B.any():
                    metrics = accumulate(metrics, loss(token_batch(microbatches, microbatch, loss, outputs))[1])
        return to_metrics(metrics).prefixed(self.context.role)

    def update(
        self, batch: Batch, loss: Loss, forward: Callable[[Microbatch], Outputs], *, observe: Observe | None = None
    ) -> Metrics:
        """One optimizer step on exactly this batch, whose rows are spread over the data ranks.

        The loss is a sum over tokens, weighted by counts over all ranks, so how rows are divided over ranks and
        microbatches changes nothing. A gradient that is not finite changes no weight and is counted in the metrics. `observe`
        may measure what the model gave; its metrics are reported beside those of the loss, and cost no wait of their own.

        Raises:
            DivergenceError: as many updates in a row as `run.max_skipped_updates` were skipped.
        """
        microbatches = self.microbatches(batch, self.config.update_tokens)
        with self.on_device(with_optimizer=True):
            started = time.perf_counter()
            metrics, observed = self._accumulate_gradients(microbatches, loss, forward, observe)
            norm, why = self._apply_gradients(lambda: dict(to_metrics(metrics)), loss.columns)
            self.num_updates += 1
            seconds = time.perf_counter() - started
        is_skipped = not math.isfinite(norm)
        if self.skipped.note(is_skipped=is_skipped, step=self.step, why=why) and self.context.rank == 0:
            logger.warning("step %d: an update of %s is skipped. %s", self.step, self.context.role, why.words)
        self.skipped.raise_if_too_many()
        counted = {
            "grad_norm": Metric(norm),
            "learning_rate": Metric(self.learning_rate),
            "tokens": Metric(float(microbatches.num_trained_tokens), kind="sum"),
            # One rank counts for all, since what ranks count is added up.
            "skipped_updates": Metric(float(is_skipped and self.context.rank == 0), kind="sum"),
        }
        if self.peak_flops is not None:
            flops = self.flops_per_token.of(microbatches.num_tokens, microbatches.num_trained_tokens)
            # Merged, it is the share over all ranks and updates.
            counted["mfu"] = Metric(flops / self.context.layout.sequence, self.peak_flops * seconds)
        numbers = to_metrics(metrics | observed)
        self.context.report(numbers.only(observed))
        return (numbers.only(metrics) + Metrics(counted)).prefixed(self.context.role)

    def _accumulate_gradients(
        self,
        microbatches: Microbatches,
        loss: Loss,
        forward: Callable[[Microbatch], Outputs],
        observe: Observe | None,
    ) -> tuple[dict[str, TokenMetric], dict[str, TokenMetric]]:
        """Metrics of the loss and of `observe`."""
        self.model.train()
        metrics: dict[str, TokenMetric] = {}
        given: list[tuple[Microbatch, Outputs]] = []
        for index, microbatch in enumerate(microbatches):
            is_last = index == len(microbatches) - 1
            fsdp.reduce_gradients(self.model, in_next_backward=bool(is_last or self.config.shard_gradients))
            outputs = forward(microbatch)
            if not microbatch.lengths_B.any():  # a dummy, or only empty responses: take part in the collectives, add nothing
                torch.stack([output.sum() for output in outputs.values()]).sum().backward()  # type: ignore[no-untyped-call]
                continue
            total, counted = loss(token_batch(microbatches, microbatch, loss, outputs))
            total.backward()  # type: ignore[no-untyped-call]
            metrics = accumulate(metrics, counted)
            if observe is not None:
                given.append((microbatch, {name: output.detach() for name, output in outputs.items()}))
        return metrics, observe(microbatches, given) if observe is not None and given else {}

    def _apply_gradients(self, losses: Callable[[], dict[str, float]], columns: Sequence[str]) -> tuple[float, WhySkipped]:
        """Clip, step, and forget the gradients; the one place of an update where the host waits for the device. Returns the
        norm and, where it is not finite, what else is not."""
        gradients = fsdp.local_gradients(self.model.parameters())
        norm = fsdp.gradient_norm(gradients, self.context.group)
        fsdp.scale_gradients(gradients, norm, self.config.max_grad_norm)
        found = norm.item()
        if math.isfinite(found):
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate
            self.optimizer.step()
            self.weights.forget()
            why = WhySkipped()
        else:
            named = list(self.model.named_parameters())
            found_gradients = largest((name, parameter.grad) for name, parameter in named)
            why = why_skipped(found, found_gradients, largest(named), losses(), columns)
        self.optimizer.zero_grad(set_to_none=True)
        return found, why

    def named_tensors(self) -> list[tuple[str, torch.Tensor]]:
        """The current weights under their Hugging Face names, sharded, each once.

        They lie in CPU memory while weights are offloaded. Every rank calls this, since merging adapters is collective.

        Raises:
            DivergenceError: a weight is not finite.
        """
        self.weights.check(self.model.named_parameters(), when=f"at the weight sync of step {self.step}")
        if not self.has_adapters:
            return named_tensors(self.model)
        with self.on_device():
            return named_tensors(self.model)

    def save(self, folder: str) -> None:
        """Write weights and optimizer, every rank its shares.

        Raises:
            DivergenceError: a weight is not finite.
        """
        self._check(when=f"when step {self.step} was saved")
        save_sharded(folder, self._state(), self.context.group)

    def restore(self, folder: str) -> None:
        """Read what `save` wrote, by any number of ranks.

        Raises:
            CheckpointError: the state is damaged, or of another model.
            DivergenceError: it holds a weight that is not finite.
        """
        fsdp.drop_gathered(self.model)
        state = self._state()
        check_same_parts(folder, state)
        load_sharded(folder, state, self.context.group)
        random_state = state["random"]
        assert isinstance(random_state, torch.Tensor)
        torch.set_rng_state(random_state)
        self._check(when=f"in the checkpoint {folder}")

    def _check(self, *, when: str) -> None:
        """Of all that is saved. Where a moment of the optimizer is infinite, its weight learns no more, in silence."""
        self.weights.forget()  # a checkpoint is worth a look at what nobody should have written to
        self.weights.check(self.model.named_parameters(), when=when)
        moments = [
            (f"{key} of {name}", tensor)
            for name, parameter in self.model.named_parameters()
            for key, tensor in self.optimizer.state.get(parameter, {}).items()
        ]
        self.moments.forget()
        self.moments.check(moments, when=when)

    def _state(self) -> dict[str, object]:
        """Tensors that share memory with the model and the optimizer, so that loading into them is loading them.

        Training draws no random numbers of its own, so one generator's state stands for those of all ranks.
        """
        named = dict(parameters_by_name(self.model))
        return {
            "model": {name: parameter.detach() for name, parameter in named.items()},
            "optimizer": {
                name: dict(self.optimizer.state[parameter]) for name, parameter in named.items() if parameter.requires_grad
            },
            "random": torch.get_rng_state(),
        }

    def onload(self, *, with_optimizer: bool = False) -> None:
        super().onload()
        if with_optimizer and self.config.offload_optimizer:
            fsdp.move_optimizer(self.optimizer, self.context.device)

    def offload(self) -> None:
        super().offload()
        if self.config.offload_optimizer:
            fsdp.move_optimizer(self.optimizer, CPU)


def token_batch(microbatches: Microbatches, microbatch: Microbatch, loss: Loss, outputs: Outputs) -> TokenBatch:
    """What `loss` is computed from."""
    device = microbatches.context.device
    weights_R = token_weights(
        torch.from_numpy(microbatch.lengths_B),
        aggregation=loss.aggregation,
        counts=microbatches.counts,
        max_tokens=loss.max_tokens,
    )
    return TokenBatch(
        log_probs_T=outputs.get("log_probs"),
        values_T=outputs.get("values"),
        entropy_T=outputs.get("entropy"),
        columns={name: microbatches.column(name, microbatch) for name in loss.columns},
        lengths_B=to_device(microbatch.lengths_B, device),
        weights_T=to_device(weights_R.numpy(), device),
    )
