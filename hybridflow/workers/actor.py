"""The actor: the policy that is trained."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from hybridflow import ops
from hybridflow.batch import Batch
from hybridflow.errors import BatchError
from hybridflow.workers.base import RankContext
from hybridflow.workers.mismatch import ObserveMismatch, entropy_metrics, mismatch_metrics
from hybridflow.workers.model_worker import ModelWorker
from hybridflow.workers.remote import remote

if TYPE_CHECKING:
    import torch

    from hybridflow.config.schema import Config
    from hybridflow.metrics import Metrics
    from hybridflow.ops import Loss
    from hybridflow.workers.microbatches import Microbatch


class ActorWorker(ModelWorker):
    """A share of the policy, with its optimizer."""

    def __init__(self, config: Config, context: RankContext):
        from hybridflow.models.build import build_policy
        from hybridflow.workers.model_spec import trained_model
        from hybridflow.workers.sync import ActorSync
        from hybridflow.workers.training import TrainingCore

        super().__init__(config, context)
        self.model = build_policy(trained_model(self.config, context, config.actor.path))
        self.core = self.trained = TrainingCore(
            self.model,
            self.config.actor,
            context,
            temperature=config.rollout.temperature or 1.0,
            max_skipped_updates=config.run.max_skipped_updates,
        )
        self.weight_sync = ActorSync(config, context)

    @remote("split_by_data_rank")
    def log_probs(self, batch: Batch) -> Batch:
        """Column `log_probs`, in nats, under the current weights, at the temperature with which each row was sampled.

        Reports `actor/entropy`, the mean over all tokens, and how far the engine's log-probabilities are where the batch has
        them.
        """

        def forward(microbatch: Microbatch) -> dict[str, torch.Tensor]:
            log_probs_R, entropy_R = self.model(microbatch.packed, temperature=microbatch.temperature, with_entropy=True)
            return {"log_probs": log_probs_R, "entropy": entropy_R}

        columns = self.core.evaluate(batch, forward)
        self.context.report(entropy_metrics(batch, columns["entropy"]))
        if "rollout_log_probs" in batch:
            is_stale = self.config.loop.max_staleness > 0
            self.context.report(mismatch_metrics(batch, columns["log_probs"], is_stale=is_stale))
        return Batch.from_columns({"log_probs": columns["log_probs"]})

    @remote("split_by_data_rank")
    def update(self, batch: Batch, *, loss: Loss) -> Metrics:
        """One optimizer step on exactly these rows. Metrics are named `actor/...`.

        Raises:
            BatchError: the loss reads a column that the batch lacks, or takes present log-probabilities for those of older
            weights.
        """
        takes_present = isinstance(loss, ops.PolicyLoss) and loss.old_log_probs == "current" and loss.correction is None
        if self.config.loop.max_staleness and takes_present:
            raise BatchError(
                "the loss takes the policy's present log-probabilities for the old ones, but with loop.max_staleness="
                f"{self.config.loop.max_staleness} older weights have sampled. Use `old_log_probs=self.old_log_probs()` on the "
                "algorithm's page, which names the engine's own where rows may be stale"
            )

        has_others = "log_probs" in batch or "rollout_log_probs" not in batch
        observe = None if has_others else ObserveMismatch(is_stale=self.config.loop.max_staleness > 0)
        return self.core.update(batch, loss, lambda microbatch: self._forward(microbatch, loss), observe=observe)

    @remote("split_by_data_rank")
    def measure(self, batch: Batch, *, loss: Loss) -> Metrics:
        """What `update` would report of the loss, without an update."""
        return self.core.measure(batch, loss, lambda microbatch: self._forward(microbatch, loss))

    def _forward(self, microbatch: Microbatch, loss: Loss) -> dict[str, torch.Tensor]:
        log_probs_R, entropy_R = self.model(
            microbatch.packed, temperature=microbatch.temperature, with_entropy=loss.needs_entropy
        )
        return {"log_probs": log_probs_R} | ({} if entropy_R is None else {"entropy": entropy_R})

    @remote("rank_zero")
    def num_updates(self) -> int:
        """Updates since this worker was built; engines take the weights when it has changed. A subclass that changes weights
        by other means than `core.update` counts those changes too."""
        return self.core.num_updates

    @remote("rank_zero")
    def transfer_address(self, receiver: str = "rollout") -> str:
        """`host:port` at which the engines of a role on another pool find the weights, for both sides' `open_transfer`."""
        return self.weight_sync.address(receiver)

    @remote("one_to_all")
    def open_transfer(self, address: str, receiver: str = "rollout") -> None:
        """Prepare to send weights to the engines of a role on another pool."""
        self.weight_sync.open(address, receiver)

    @remote("one_to_all")
    def send_weights(self, receiver: str = "rollout") -> Metrics:
        """Send the current weights to every rank of that role that is in `receive_weights`. Metrics are named
        `sync/send_...`."""
        return self.weight_sync.send(self.named_tensors(), receiver)

    def named_tensors(self) -> list[tuple[str, torch.Tensor]]:
        """The current weights under their Hugging Face names, as this rank's shards, each once, adapters merged.

        Every rank calls it, since merging adapters is collective. Tensors share memory with the model where nothing is merged.
        """
        return self.core.named_tensors()

    @remote("split_by_data_rank")
    def probe_differences(self, rows: Batch) -> Batch:
        """Column `difference` of the rows of `rollout.probe_rows`: the largest of each, in nats."""
        from hybridflow.workers.proof import differences

        return Batch({"difference": differences(rows, self, self.context)})

    @remote("one_to_all")
    def flip_signs(self, names: Collection[str]) -> None:
        """Change the sign of half of the elements of these weights, the same ones each time: for `workers/proof.py`."""
        from hybridflow.models.build import flip_signs

        flip_signs(self.model, names)
