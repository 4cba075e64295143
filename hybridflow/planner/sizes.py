"""What one model takes of a GPU, from its sizes alone. Bytes, on one rank.

The rules follow the code: float32 master weights and AdamW moments (models/build.py, workers/training.py), copies in the
compute dtype and gradients summed over microbatches before they are sharded (parallel/fsdp.py), logits in chunks
(ops/log_probs.py).
docs/memory.md compares them with measured peaks.
"""

from __future__ import annotations

from dataclasses import dataclass

MASTER_BYTES = 4
MOMENTS_BYTES = 8
LOGIT_BYTES = {"forward": (12, 8), "backward": (12, 10)}
"""Per logit of a chunk (eager, compiled). Backward: the chunk, its log-softmax and two bfloat16 gradients; compiled, a second
chunk in place of the log-softmax. benchmarks/results/output_layer_h200.jsonl has the same, to 1 %. Forward with entropies."""
EAGER_EXCESS = 1.27
"""Peak of activations without torch.compile over what autograd saves, in benchmarks/results/ppo_step_W1_two_pools.json, the one
such run on record. What the excess consists of is not known."""
GATHERED_LAYERS = 3
"""Layers of which FSDP2 holds a copy at once: the one that computes, and the next one as it arrives and as it is unpacked."""

REDUCED_LAYERS = 2
"""Layers whose whole gradients exist at once where they are sharded with each microbatch: FSDP2 sums those of one over ranks
while the next one computes its own."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """The numbers of a causal language model that decide what it takes; those of Qwen2.5-7B are given as an example."""

    parameters: int
    """All, tied ones once: 7,615,616,512."""
    trained_parameters: int
    """With LoRA those of the adapters, else all."""
    output_parameters: int
    """Of an output layer that is not tied to the embeddings: 544,997,376, which is vocabulary x hidden."""
    layer_parameters: int
    """Of the largest decoder layer: 233,057,792."""
    layers_parameters: int
    """Of all decoder layers: 28 x 233,057,792."""
    num_layers: int
    hidden: int
    """Channels between the layers: 3584."""
    attention: int
    """Channels of all query heads: 28 x 128."""
    key_value: int
    """Channels of all key heads, as many as of all value heads: 4 x 128."""
    feed_forward: int
    """Channels within the feed-forward part that one token passes; of a mixture, those of its chosen experts: 18944."""
    vocabulary: int
    """Rows of the output layer: 152064."""


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """How training models compute: what holds for all of a run."""

    compute_bytes: int = 2
    """Of a number in matrix products."""
    is_compiled: bool = False
    chunk_tokens: int = 4096
    """Tokens whose logits exist at once."""


@dataclass(frozen=True, kw_only=True)
class TokenLimits:
    """Between what microbatches of a model are to be chosen, where the user gave no numbers."""

    longest_row: int
    """Goes alone where it exceeds a microbatch, so a smaller microbatch saves nothing."""
    update: int
    """More tokens than these gain nothing."""
    forward: int | None
    """The same in passes without gradients; None where the user gave that number."""


@dataclass(frozen=True, kw_only=True)
class ModelNeeds:
    """A role with a model, on one of the ranks that share it."""

    role: str
    size: ModelSize
    num_ranks: int
    is_trained: bool
    has_output_layer: bool
    """False for a value model."""
    tokens: int
    """Most tokens that go through the model at once in an update."""
    forward_tokens: int | None = None
    """The same in passes without gradients; None means as in an update."""
    numerics: Numerics
    limits: TokenLimits | None = None
    """Where the number of tokens is left to the plan."""

    @property
    def passing_tokens(self) -> int:
        """Most tokens that go through the model at once without gradients."""
        return self.tokens if self.forward_tokens is None else self.forward_tokens

    @property
    def parameters(self) -> int:
        return self.size.parameters - (0 if self.has_output_layer else self.size.output_parameters)

    @property
    def trained_parameters(self) -> int:
        return min(self.size.trained_parameters, self.parameters) if self.is_trained else 0

    @property
    def has_adapters(self) -> bool:
        return self.is_trained and self.size.trained_parameters < self.size.parameters

    @property
    def weights(self) -> int:
        """This rank's share; a frozen model is kept as it computes."""
        return self.parameters * (MASTER_BYTES if self.is_trained else self.numerics.compute_bytes) // self.num_ranks

    @property
    def optimizer(self) -> int:
        """This rank's share of the two moments."""
        return self.trained_parameters * MOMENTS_BYTES // self.num_ranks

    def gradients(self, *, are_sharded: bool) -> int:
        """Summed over microbatches in float32; sharded over ranks with the last one only, or layer by layer with each."""
        whole = self.trained_parameters * MASTER_BYTES
        if not are_sharded:
            return whole
        return whole // self.num_ranks + min(whole, REDUCED_LAYERS * self.size.layer_parameters * MASTER_BYTES)

    @property
    def gathered(self) -> int:
        """Weights as layers see them: one rank keeps all of them until the pass ends, several gather layer by layer."""
        if self.num_ranks == 1:
            return self.parameters * self.numerics.compute_bytes
        outside = self.parameters - self.size.layers_parameters
        return (outside + GATHERED_LAYERS * self.size.layer_parameters) * self.numerics.compute_bytes

    def forward(self) -> int:
        """A pass without gradients, beside the weights: the widest moment of a layer, or of a chunk of logits."""
        size, number = self.size, self.numerics.compute_bytes
        tokens = self.passing_tokens
        layer = tokens * number * (3 * size.feed_forward + 6 * size.hidden)
        return self.gathered + max(layer, self._logits("forward", tokens))

    def backward(self, *, is_checkpointed: bool) -> int:
        """A pass with gradients, beside weights and gradients: its widest moment is where backward begins, or where it ends."""
        size, number = self.size, self.numerics.compute_bytes
        layer = self._kept_per_token() * self.tokens
        gradients_of_layer = self.tokens * number * 3 * size.feed_forward
        head = 0 if self.has_adapters or not self.has_output_layer else size.vocabulary * size.hidden * MASTER_BYTES
        output_layer = self._logits("backward", self.tokens) + head
        if is_checkpointed:
            beginning = size.num_layers * self.tokens * number * size.hidden + max(layer + gradients_of_layer, output_layer)
        else:
            beginning = size.num_layers * layer + max(gradients_of_layer, output_layer)
        # In the end the gradients of what lies outside the layers, embeddings and head, are copied to be sharded over ranks.
        outside = 0 if self.has_adapters else self.parameters - size.layers_parameters
        ending = outside * MASTER_BYTES * (self.num_ranks + 1) // self.num_ranks
        return self.gathered + max(beginning, ending)

    def _kept_per_token(self) -> int:
        """Of one layer, for its backward pass: bytes per token.

        Eager, each of two norms keeps its float32 input, its result and its scaled result; attention keeps query, repeated
        key and value, and result; the feed-forward part keeps four of its channels. Compiled layers recompute all but the
        inputs of matrix products and the residual stream.
        """
        size, number = self.size, self.numerics.compute_bytes
        if self.numerics.is_compiled:
            return number * (4 * size.hidden + 4 * size.attention + 3 * size.feed_forward)
        kept = 2 * size.hidden * (4 + 2 * number) + number * (4 * size.attention + 4 * size.feed_forward)
        return int(kept * EAGER_EXCESS)

    def _logits(self, direction: str, tokens: int) -> int:
        per_logit = LOGIT_BYTES[direction][self.numerics.is_compiled]
        chunk = min(self.numerics.chunk_tokens, tokens)
        return chunk * self.size.vocabulary * per_logit if self.has_output_layer else 0
