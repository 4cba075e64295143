"""A reward model, or anything else that scores, behind an address that takes JSON and answers JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping

from hybridflow.rewards.call import RewardInput
from hybridflow.rewards.results import finite
from hybridflow.rewards.service import Service, ServiceError

REWARD_NAME = "http"

FIELDS = ("conversation", "response", "prompt", "messages", "ground_truth", "data_source", "extra_info")


async def compute_score(
    reward_input: RewardInput,
    *,
    url: str,
    fields: Mapping[str, str] | None = None,
    request: Mapping[str, object] | None = None,
    result: str = "score",
    api_key_env: str = "REWARD_API_KEY",
    timeout_s: float = 30.0,
    max_retries: int = 4,
    retry_wait_s: float = 0.5,
) -> float:
    """The number that the service at `url` answers.

    It gets the fields of the response as JSON; `fields` chooses and renames them: `{messages: conversation}` sends the
    conversation as `messages`, and `{input: response}` the text as `input`. `request` adds fields of its own, such as `model`.
    `result` says where the number is in the answer: `score`, `data.0.embedding.0`, or empty where the answer is the number.

    Raises:
        ServiceError: no answer after all attempts, or nothing at `result`.
        TypeError, ValueError: what is there is no finite number.

    Example: vLLM serving a reward model at `/classify` with `fields={input: response}`, `request={model: NAME}` and
    `result=data.0.probs.0`.
    """
    given: Mapping[str, object] = {**reward_input}
    question = {theirs: given[ours] for theirs, ours in (fields or dict(zip(FIELDS, FIELDS, strict=True))).items()}
    service = Service(
        url=url,
        api_key=os.environ.get(api_key_env),
        timeout_s=timeout_s,
        max_retries=max_retries,
        retry_wait_s=retry_wait_s,
    )
    answer = await service.ask({**question, **(request or {})})
    return finite(_found(answer, result, url))


def _found(answer: object, path: str, url: str) -> object:
    """What lies at a dotted path of names and numbers."""
    value = answer
    for part in filter(None, path.split(".")):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]  # type: ignore[index]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ServiceError(f"{url}: the answer has nothing at {path!r}: {str(answer)[:300]}") from error
    return value
