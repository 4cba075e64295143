"""Generation with nothing but torch and transformers: continuous batching over the slots of a key-value cache.

A step admits waiting requests into free slots, runs their prompts (each distinct prompt once, however many responses
it gets), and then advances every running row by one token. Rows that finish leave at once: the last ones move into
their slots, so that the running rows are always the first ones and the cache is read without a gather.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hybridflow.data.chat import tokenizer_at
from hybridflow.errors import EngineError
from hybridflow.models import self_test
from hybridflow.models.load import LoadingInfo, check_complete, check_numbers, explained, length_limit
from hybridflow.rollout.base import Engine, EngineSpec, Request, Response, Sampling
from hybridflow.rollout.expected_weights import ExpectedWeights
from hybridflow.rollout.running_rows import RunningRows, Slots
from hybridflow.rollout.sampling import choose
from hybridflow.rollout.slot_cache import ATTENTION, DecodeAttention, PrefillAttention, SlotCache, StepAttention, register
from hybridflow.rollout.stopping import detokenizer, end_of_sequence_ids

logger = logging.getLogger("hybridflow")

TESTED_PROMPT_TOKENS, TESTED_RESPONSE_TOKENS = (11, 7), 4
"""Of the responses that an engine compares when it starts."""
PREFILL_TOKENS = 16384
"""Prompt tokens, padded to the longest, that go through attention at once."""


class TorchEngine(Engine):
    """Runs any causal language model of transformers that takes its attention from `AttentionInterface`, on one rank."""

    can_replay_loads = True

    def __init__(self, spec: EngineSpec):
        super().__init__(spec)
        assert spec.layout.tensor == 1, "the torch engine does not shard weights; config/rules_engine checks this"
        register()
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        with explained(spec.model, "a model that the torch engine can generate with"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                spec.model,
                dtype=spec.torch_dtype,
                attn_implementation=ATTENTION,
                trust_remote_code=spec.trust_remote_code,
                ignore_mismatched_sizes=True,  # they are told by name
                output_loading_info=True,
            )
        self.model, found = cast("tuple[PreTrainedModel, LoadingInfo]", loaded)
        check_complete(spec.model, found)
        check_numbers(spec.model, self.model)
        module: torch.nn.Module = self.model
        module.to(spec.device).eval().requires_grad_(False)
        tokenizer = tokenizer_at(spec.tokenizer or spec.model, trust_remote_code=spec.trust_remote_code)
        self.expected_weights = ExpectedWeights(spec.model, trust_remote_code=spec.trust_remote_code)
        self.waiting: deque[Request] = deque()
        self.num_slots = self._num_slots()
        # Of the self-test; so that the memory of all slots is not taken before it is needed.
        self.cache = SlotCache(min(self.num_slots, len(TESTED_PROMPT_TOKENS)), spec.max_model_tokens)
        self.rows = RunningRows(
            self.num_slots,
            spec.max_model_tokens,
            end_ids=end_of_sequence_ids(spec.model, tokenizer, trust_remote_code=spec.trust_remote_code),
            detokenize=detokenizer(tokenizer),
        )
        self._check_itself()
        self.cache = SlotCache(self.num_slots, spec.max_model_tokens)

    def _check_itself(self) -> None:
        """Two short responses, against the log-probabilities that transformers gives them with its own attention.

        Raises:
            ModelError: they differ, or there are none.
        """
        most = self.spec.max_model_tokens
        num_response = min(TESTED_RESPONSE_TOKENS, most - 1)
        sampling = Sampling(max_tokens=num_response, ignore_eos=True)
        prompts = self_test.text_rows(self.model.config, tuple(min(n, most - num_response) for n in TESTED_PROMPT_TOKENS))
        requests = [Request(id=i, prompt=row.astype(np.int32), sampling=sampling, seed=i) for i, row in enumerate(prompts)]
        self.waiting.extend(requests)
        finished: list[Response] = []
        with self_test.computing(self.spec.model, self.model, "token by token"):
            while self.waiting or self.rows.count:
                finished += TorchEngine.step(self)  # whatever a subclass makes of it
        responses = sorted(finished, key=lambda response: response.id)
        differences = []
        own = self_test.computing(self.spec.model, self.model, "one row at a time")
        with torch.inference_mode(), self_test.own_attention(self.model), own:
            for prompt, response in zip(prompts, responses, strict=True):
                tokens_T = self._to_device(np.concatenate([prompt, response.tokens]))
                own_T = self_test.own_log_probs(self.model, tokens_T)[len(prompt) - 1 :]
                differences.append(np.abs(own_T.cpu().numpy() - response.log_probs))
        difference, allowed = float(np.concatenate(differences).mean()), self_test.TOLERANCE[self.spec.torch_dtype]
        if not difference <= allowed:  # not a number counts as different
            raise EngineError(
                f"the torch engine gives responses of {self.spec.model!r} ({type(self.model).__name__}) log-probabilities that "
                f"differ from transformers' own by {difference:.3g} nats on average; {allowed:g} is allowed. It would generate "
                "wrongly: layers of this model keep more than keys and values, or mask them in a way of their own. Set "
                "rollout.engine=vllm"
            )

    def _num_slots(self) -> int:
        """How many responses of full length fit the memory for the cache, `max_num_seqs` at most."""
        probe, first = SlotCache(num_slots=1, tokens_per_slot=1), np.zeros(1, np.int64)
        with self_test.computing(self.spec.model, self.model, "token by token"):
            self._prefill_logits(probe, [np.zeros(1, np.int32)], prompt_of_slot=first, slots=first)
        self._check_lengths(probe)
        bytes_per_row = probe.num_bytes * self.spec.max_model_tokens
        room = self.spec.cpu_cache_gib * 2**30
        if self.spec.device.type == "cuda":
            weights = sum(parameter.nbytes for parameter in self.model.parameters())
            room = self.spec.gpu_memory_utilization * torch.cuda.mem_get_info(self.spec.device)[1] - weights
        num_slots = min(self.spec.max_num_seqs, int(room // bytes_per_row))
        if num_slots < 1:
            raise EngineError(
                f"the cache of one response of {self.spec.max_model_tokens} tokens takes {bytes_per_row / 2**30:.2f} GiB, "
                f"but the engine has {max(room, 0) / 2**30:.2f} GiB. "
                "Raise rollout.gpu_memory_utilization (CUDA) or rollout.cpu_cache_gib (CPU)"
            )
        if num_slots < self.spec.max_num_seqs:
            logger.info(
                "torch engine: %.1f GiB of cache hold %d responses of %d tokens at once, not the %d of rollout.max_num_seqs",
                room / 2**30, num_slots, self.spec.max_model_tokens, self.spec.max_num_seqs,
            )  # fmt: skip
        return num_slots

    def _check_lengths(self, probe: SlotCache) -> None:
        """Raise where rows may be longer than the model can read, or than it computes like any other here.

        `probe` is what its layers wrote.
        """
        model, most, config = self.spec.model, self.spec.max_model_tokens, self.model.config
        if not probe.num_bytes:
            raise EngineError(
                f"the torch engine cannot generate with {model!r} ({type(self.model).__name__}), whose layers do not take "
                "their attention from transformers' AttentionInterface. Set rollout.engine=vllm"
            )
        context, limit = config.get_text_config().to_dict().get("max_position_embeddings"), length_limit(config)
        advice = "Lower data.max_prompt_tokens or data.max_response_tokens"
        if isinstance(context, int) and most > context:
            raise EngineError(f"prompt and response may have {most} tokens, but {model} was made for {context}. {advice}")
        # A window that layers tell attention of is kept.
        if limit is not None and most > limit.tokens and limit.tokens not in probe.windows:
            raise EngineError(
                f"prompt and response may have {most} tokens, but {model} {limit.what}, which the torch engine does not do for "
                f"it. {advice} to {limit.tokens} together, or set rollout.engine=vllm"
            )

    def add(self, request: Request) -> None:
        self.check_length(request)
        self.waiting.append(request)

    @property
    def num_unfinished(self) -> int:
        return len(self.waiting) + self.rows.count

    def step(self) -> list[Response]:
        responses: list[Response] = []
        with torch.inference_mode():
            if self.waiting and self.rows.num_free:
                self._admit()
                responses += self._take_finished()
            if self.rows.count:
                self._decode()
                responses += self._take_finished()
        return responses

    def interrupt(self) -> list[Response]:
        responses = self.rows.take_all() + [Response.without_tokens(request) for request in self.waiting]
        self.waiting.clear()
        return responses

    def _admit(self) -> None:
        """Start as many requests as there are free slots, with one pass over each distinct prompt."""
        requests = [self.waiting.popleft() for _ in range(min(len(self.waiting), self.rows.num_free))]
        slots = self.rows.start(requests)
        slots_of_prompt: dict[bytes, list[int]] = {}
        for slot, request in zip(slots, requests, strict=True):
            slots_of_prompt.setdefault(np.asarray(request.prompt, np.int32).tobytes(), []).append(int(slot))
        groups = sorted(slots_of_prompt.items(), key=lambda group: len(group[0]), reverse=True)
        while groups:
            prompts_at_once = max(1, PREFILL_TOKENS * np.dtype(np.int32).itemsize // len(groups[0][0]))
            chunk, groups = groups[:prompts_at_once], groups[prompts_at_once:]
            prompts = [np.frombuffer(tokens, np.int32) for tokens, _ in chunk]
            prompt_of_slot = np.repeat(np.arange(len(chunk)), [len(group) for _, group in chunk])
            chunk_slots = np.concatenate([group for _, group in chunk])
            logits_BV = self._prefill_logits(self.cache, prompts, prompt_of_slot=prompt_of_slot, slots=chunk_slots)
            self._append(chunk_slots, logits_BV[self._to_device(prompt_of_slot)])

    def _prefill_logits(
        self, cache: SlotCache, prompts: Sequence[npt.NDArray[np.int32]], *, prompt_of_slot: Slots, slots: Slots
    ) -> torch.Tensor:
        """Run prompts into their slots; the logits of the token after each prompt."""
        step = PrefillAttention(
            cache,
            self._to_device(np.array([len(prompt) for prompt in prompts])),
            prompt_of_slot=self._to_device(prompt_of_slot),
            slots=self._to_device(slots),
        )
        tokens_T = self._to_device(np.concatenate(prompts).astype(np.int64))
        return self._forward(tokens_T, step.positions_T, step, keep=step.last_B)

    def _decode(self) -> None:
        """One token for every running row."""
        slots = self.rows.running
        num_cached = self.rows.num_cached(slots)
        positions_B = self._to_device(num_cached)
        step = DecodeAttention(self.cache, positions_B, max_length=int(num_cached.max()))
        self._append(slots, self._forward(self._to_device(self.rows.table["token"][slots]), positions_B, step, keep=0))

    def _forward(
        self, tokens_T: torch.Tensor, positions_T: torch.Tensor, step: StepAttention, *, keep: torch.Tensor | int
    ) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = self.model(
                input_ids=tokens_T[None],
                position_ids=positions_T[None],
                use_cache=False,
                logits_to_keep=keep,
                slot_step=step,
            ).logits
        return logits[0]

    def _append(self, slots: Slots, logits_BV: torch.Tensor) -> None:
        tokens_B, log_probs_B = choose(logits_BV, self.rows.sampling(slots, logits_BV.device))
        self.rows.append(slots, tokens_B.cpu().numpy(), log_probs_B.cpu().numpy())

    def _take_finished(self) -> list[Response]:
        responses, moves = self.rows.take_finished()
        if moves is not None:
            self.cache.move(
                sources=self._to_device(moves.sources), targets=self._to_device(moves.targets), num_tokens=moves.num_tokens
            )
        return responses

    def _to_device(self, numbers: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(numbers)).to(self.spec.device)

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.check_idle()
        own = self.model.state_dict()
        checked = self.expected_weights.of(weights)
        for name, tensor in checked:
            own[name].copy_(tensor)
        checked.finish()

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.model.named_parameters()

    def sleep(self) -> None:
        self.check_idle()
        self.cache.layers.clear()
        if self.spec.device.type == "cuda":
            torch.cuda.empty_cache()
