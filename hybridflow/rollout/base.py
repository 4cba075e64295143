"""The interface of a generation engine. Every engine in the table passes tests/unit/test_engine_contract.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from hybridflow.errors import EngineError

if TYPE_CHECKING:
    import torch

    from hybridflow.parallel.layout import Layout

FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. The log-probabilities returned are those of the distribution after temperature and before
    top-p, top-k and min-p filter it, which is what training computes."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_p: float = 1.0
    """Smallest set of tokens whose probabilities reach this sum; 1 keeps all."""
    top_k: int = 0
    """The most probable tokens kept; 0 keeps all."""
    min_p: float = 0.0
    """Tokens less probable than this times the most probable are dropped; 0 keeps all."""
    max_tokens: int = 256
    """Most tokens of a response, end of sequence included."""
    stop: tuple[str, ...] = ()
    """Strings that end a response; the response keeps the tokens up to the one that completes the string."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response, beside the model's end of sequence; kept in the response."""
    ignore_eos: bool = False
    """Generate on after the end of sequence, for benchmarks of fixed length."""
    log_probs: bool = True
    """Return the log-probability of each token."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One response to be generated."""

    id: int
    """Chosen by the caller, unique among unfinished requests."""
    prompt: npt.NDArray[np.int32]
    """Token ids, shape [P], at least one."""
    sampling: Sampling
    seed: int = 0
    """The response is a function of weights, prompt, sampling and seed, whatever else is being generated."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """A response, or the part of one that was there when its engine was interrupted."""

    id: int
    tokens: npt.NDArray[np.int32]
    """Shape [R], the ending token included. At least one, unless interrupted."""
    log_probs: npt.NDArray[np.float32] | None
    """Shape [R], in nats; None where not asked for."""
    finish_reason: FinishReason
    num_cached_tokens: int = 0
    """Of the prompt: those whose keys and values were there already, computed for an earlier request. Zero also where an engine
    does not say."""

    @classmethod
    def without_tokens(cls, request: Request) -> Response:
        """What is there of a request that was interrupted before its first token."""
        return cls(
            id=request.id,
            tokens=np.empty(0, np.int32),
            log_probs=np.empty(0, np.float32) if request.sampling.log_probs else None,
            finish_reason="interrupted",
        )


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """What an engine is built from."""

    model: str
    """Local folder or hub name of a causal language model."""
    dtype: str
    """`float32` or `bfloat16`."""
    max_model_tokens: int
    """Most tokens of prompt and response together."""
    max_num_seqs: int
    """Most responses generated at once; more wait."""
    seed: int
    device: torch.device
    layout: Layout
    """The generation layout: tensor ranks share one engine."""
    rank: int
    """Of this process in the pool."""
    gpu_memory_utilization: float
    """Share of the GPU that weights and cache of the engine may take."""
    cpu_cache_gib: float
    """Size of the key-value cache of an engine that reserves it on the CPU."""
    enforce_eager: bool
    options: dict[str, object] = field(default_factory=dict)
    """Passed through to the engine's own constructor."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; None means the model's."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    seed_requests: bool = True
    """Heed the seeds of requests; an engine for which that costs nothing may always do so."""
    most_rows: int | None = None
    """Responses that are under way at once at the most; None where that is not known. More are answered too, perhaps slower."""
    can_sleep: bool = False
    """Start in such a way that `sleep` frees what it can, where that must be decided at the start."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's own."""
        import torch

        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]


class Engine(ABC):
    """Generates responses. Requests may be added at any time; `step` advances all that run.

    Example:
        engine.add(Request(id=7, prompt=np.array([5, 9], np.int32), sampling=Sampling(max_tokens=3)))
        [response for _ in range(3) for response in engine.step()]
        # [Response(id=7, tokens=array([12, 40, 8]), log_probs=array([-1.3, -0.2, -2.7]), finish_reason='length', ...)]
    """

    can_replay_loads: bool = False
    """Whether `load_weights`, once it has run, does nothing but launch the same copies into the same memory and forget
    prefixes: then its launches are recorded on CUDA and made again without it."""

    def __init__(self, spec: EngineSpec):
        self.spec = spec

    def check_length(self, request: Request) -> None:
        """Raise where a request has no prompt or does not fit the context.

        Raises:
            EngineError: it says by how much.
        """
        num_prompt, num_response, limit = len(request.prompt), request.sampling.max_tokens, self.spec.max_model_tokens
        if num_prompt == 0 or num_response < 1:
            raise EngineError(
                f"request {request.id} has {num_prompt} prompt tokens and asks for {num_response}; both must be at least 1"
            )
        if num_prompt + num_response > limit:
            raise EngineError(
                f"request {request.id} has {num_prompt} prompt tokens and asks for up to {num_response} more, over the "
                f"engine's limit of {limit}. Shorten the prompt, or raise data.max_prompt_tokens or data.max_response_tokens"
            )

    def check_idle(self) -> None:
        """Raise where requests are unfinished: their cache belongs to the weights that they began with.

        Raises:
            EngineError: it says how many.
        """
        if self.num_unfinished:
            raise EngineError(f"{self.num_unfinished} requests are unfinished; weights and memory can change only when none is")

    @abstractmethod
    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            EngineError: prompt and `max_tokens` together exceed the model's context.
        """

    @abstractmethod
    def step(self) -> list[Response]:
        """Advance the running requests by at least one token and return those that finished."""

    @property
    @abstractmethod
    def num_unfinished(self) -> int:
        """Requests added and not yet returned."""

    def interrupt(self) -> list[Response]:
        """Stop all unfinished requests between two steps, also those that wait, and return what is there of each.

        The engine is idle afterwards: weights can change, and a response can go on as a new request whose prompt is the old one
        and the tokens so far. It then needs a seed of its own, and a stop string that began before is not seen. The
        `finish_reason` is "interrupted", but for requests that finished meanwhile. An engine that cannot stop in the middle, as
        here, answers its requests in full.
        """
        finished: list[Response] = []
        while self.num_unfinished:
            finished += self.step()
        return finished

    def generate(self, requests: Sequence[Request]) -> list[Response]:
        """The responses, in the order of the requests. The engine must be idle.

        Raises:
            EngineError: the engine became idle without an answer to some request.
        """
        for request in requests:
            self.add(request)
        finished: dict[int, Response] = {}
        while self.num_unfinished:
            finished |= {response.id: response for response in self.step()}
        if lost := [request.id for request in requests if request.id not in finished]:
            raise EngineError(f"{len(lost)} of {len(requests)} requests were never answered, the first is {lost[0]}")
        return [finished[request.id] for request in requests]

    @abstractmethod
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights by full tensors under their Hugging Face names, and forget cached prefixes.

        Tensors may be views of a buffer that is reused once the iterator advances. Of those that an engine with tensor
        parallelism shards by one slice, later loads may hold that slice only (resharding/partial_tensor.py).

        Raises:
            EngineError: requests are unfinished; a weight is unknown or has another shape; or some were not given.
        """

    def reset_prefix_cache(self) -> None:  # noqa: B027, an engine may cache none
        """Forget cached prefixes, since the weights have changed where they are."""

    @abstractmethod
    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's part of each weight that can be read back bit by bit, under its Hugging Face name; for checksums.

        With tensor parallelism a part is a slice along one dim. A weight that cannot be read back is left out.
        """

    def sleep(self) -> None:  # noqa: B027, an engine may have nothing to give back
        """Give back the memory of the cache (and of the weights, where the engine can)."""

    def wake_up(self) -> None:  # noqa: B027
        """Take it again, before weights are loaded or requests added."""

    def close(self) -> None:  # noqa: B027
        """End threads and processes of the engine."""
