"""The policy: a causal language model that gives log-probabilities of response tokens instead of logits.

T tokens of the packed sequence (those of this sequence rank), R response tokens, H hidden channels, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from hybridflow.models.load import output_layer
from hybridflow.models.packing import Packed
from hybridflow.ops.log_probs import EAGER, ChunkKernels, LinearLogProbs
from hybridflow.parallel.sequence import SequenceGroup


class PolicyModel(nn.Module):
    """Backbone and output layer in one forward, so that FSDP gathers both in time."""

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        *,
        chunk_tokens: int,
        kernels: ChunkKernels = EAGER,
        sequence_group: SequenceGroup | None = None,
    ):
        super().__init__()
        self.causal_lm = causal_lm
        self.chunk_tokens, self.kernels = chunk_tokens, kernels
        self.sequence_group = sequence_group

    def forward(
        self, packed: Packed, *, temperature: float | torch.Tensor = 1.0, with_entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities and, where asked for, entropies at each response token of all rows: [R], float32, in nats."""
        hidden_RH = shifted_hidden_states(self.causal_lm.base_model, packed, self.sequence_group)
        head = output_layer(self.causal_lm)
        log_probs_of = LinearLogProbs(
            temperature=temperature, chunk_tokens=self.chunk_tokens, with_entropy=with_entropy, kernels=self.kernels
        )
        log_probs_R, entropy_R = log_probs_of(hidden_RH, head.weight, packed.targets_R, head.bias)
        # Copies, since FSDP hooks onto what a module returns, and views would lose the hook when changed in place.
        log_probs_R, entropy_R = log_probs_R.clone(), None if entropy_R is None else entropy_R.clone()
        if self.sequence_group is not None:
            log_probs_R = self.sequence_group.gather(log_probs_R, packed.rank_sizes)
            entropy_R = None if entropy_R is None else self.sequence_group.gather(entropy_R, packed.rank_sizes)
        return log_probs_R, entropy_R


def shifted_hidden_states(backbone: nn.Module, packed: Packed, sequence_group: SequenceGroup | None) -> torch.Tensor:
    """The backbone's output before each response token that this sequence rank predicts: shape [R, H]."""
    output = backbone(
        input_ids=packed.input_ids_1T,
        position_ids=packed.position_ids_1T,
        use_cache=False,
        row_spans=packed.spans,
        sequence_group=sequence_group,
    )
    hidden_TH: torch.Tensor = output.last_hidden_state[0]
    return hidden_TH.index_select(0, packed.predicting_R)
