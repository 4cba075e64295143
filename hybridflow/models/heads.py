"""The value model: the backbone of a language model with one number per token on top.

R response tokens, H hidden channels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from hybridflow.errors import ModelError
from hybridflow.models.packing import Packed
from hybridflow.models.policy import shifted_hidden_states
from hybridflow.parallel.sequence import SequenceGroup

VALUE_HEAD_FILE = "value_head.safetensors"
"""Beside the backbone in the folder of an exported critic: `weight` of shape [1, H] and `bias` of shape [1], in float32."""


class ValueHead(nn.Module):
    """A linear map to one number, computed in float32. Begins at zero: without a guess nothing is expected."""

    def __init__(self, hidden_size: int, device: torch.device):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros(1, dtype=torch.float32, device=device))

    def forward(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """Values: shape [R], float32."""
        return torch.mv(hidden_RH.float(), self.weight[0]) + self.bias

    def take_from(self, folder: str) -> None:
        """Begin where the critic ended that was exported to `folder`; a model that is no critic changes nothing.

        Raises:
            ModelError: the head there is damaged, or of another model.
        """
        file = Path(folder) / VALUE_HEAD_FILE
        if not file.is_file():
            return
        try:
            self.load_state_dict(load_file(file))
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ModelError(
                f"{file} does not load as the value head of this model: {error}. Export the critic again"
            ) from error


class ValueModel(nn.Module):
    """Expected return before each response token, read off at the position before it."""

    def __init__(self, causal_lm: PreTrainedModel, *, sequence_group: SequenceGroup | None = None):
        super().__init__()
        self.backbone = causal_lm.base_model
        device = next(causal_lm.parameters()).device
        self.value_head = ValueHead(causal_lm.config.get_text_config().hidden_size, device)
        self.sequence_group = sequence_group

    def forward(self, packed: Packed) -> torch.Tensor:
        """Values at each response token of all rows: shape [R], float32, in units of the reward."""
        values_R: torch.Tensor = self.value_head(shifted_hidden_states(self.backbone, packed, self.sequence_group))
        return values_R if self.sequence_group is None else self.sequence_group.gather(values_R, packed.rank_sizes)
