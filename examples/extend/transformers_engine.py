"""A generation engine of your own: transformers' `generate`, one request at a time.

Slow, and small: it samples by temperature alone and refuses what it does not do.
Run it with `rollout.engine=examples.extend.transformers_engine:TransformersEngine`.
"""

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from hybridflow.errors import EngineError
from hybridflow.rollout.base import Engine, EngineSpec, Request, Response


class TransformersEngine(Engine):
    """Takes the oldest request at each step and generates its whole response."""

    def __init__(self, spec: EngineSpec):
        super().__init__(spec)
        self.model = AutoModelForCausalLM.from_pretrained(spec.model, dtype=spec.dtype).to(spec.device).eval()
        self.waiting: deque[Request] = deque()

    @property
    def num_unfinished(self) -> int:
        return len(self.waiting)

    def add(self, request: Request) -> None:
        self.check_length(request)
        cuts = request.sampling
        if cuts.top_p < 1 or cuts.top_k or cuts.min_p or cuts.stop:
            raise EngineError("this engine knows no top_p, top_k, min_p and stop; leave them at their defaults")
        self.waiting.append(request)

    def step(self) -> list[Response]:
        request = self.waiting.popleft()
        prompt = torch.as_tensor(request.prompt.astype(np.int64), device=self.spec.device)[None]
        torch.manual_seed(request.seed)
        ends = [*np.atleast_1d(self.model.generation_config.eos_token_id).tolist(), *request.sampling.stop_token_ids]
        made = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=request.sampling.temperature > 0,
            temperature=request.sampling.temperature or 1.0,
            top_k=0,
            max_new_tokens=request.sampling.max_tokens,
            min_new_tokens=request.sampling.max_tokens if request.sampling.ignore_eos else 0,
            eos_token_id=ends,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = made.sequences[0, prompt.shape[1] :]
        logits = torch.cat(made.logits).float() / (request.sampling.temperature or 1.0)
        log_probs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        return [
            Response(
                id=request.id,
                tokens=tokens.cpu().numpy().astype(np.int32),
                log_probs=log_probs.cpu().numpy(),
                finish_reason="stop" if int(tokens[-1]) in ends else "length",
            )
        ]

    def interrupt(self) -> list[Response]:
        responses = [Response.without_tokens(request) for request in self.waiting]
        self.waiting.clear()
        return responses

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        own = self.model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, tensor in weights:
                own[name].copy_(tensor)

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.model.named_parameters()
