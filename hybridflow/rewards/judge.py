"""A language model as judge, at any address that speaks OpenAI's chat completions: vLLM, SGLang, OpenAI, and others."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from string import Template
from typing import cast

from hybridflow.errors import RewardError
from hybridflow.rewards.call import Messages, RewardInput
from hybridflow.rewards.service import Service, ServiceError

REWARD_NAME = "judge"

TEMPLATE = """Judge the last answer of the assistant in this conversation.

$conversation

Reference answer: $ground_truth

Is the last answer correct and helpful? Think briefly, then end with a line "Score: N", where N is a number from 0 to 10."""
PATTERN = r"score\s*[:=]\s*\**\s*(-?\d+(?:\.\d+)?)"


async def compute_score(
    reward_input: RewardInput,
    *,
    base_url: str,
    model: str,
    template: str = TEMPLATE,
    system: str | None = None,
    pattern: str = PATTERN,
    scale: Sequence[float] = (0.0, 10.0),
    api_key_env: str = "OPENAI_API_KEY",
    timeout_s: float = 30.0,
    max_retries: int = 4,
    retry_wait_s: float = 0.5,
    request: Mapping[str, object] | None = None,
) -> Mapping[str, float]:
    """The judge's number, put on 0 to 1.

    `template` is a text with `$conversation`, `$response`, `$prompt`, `$ground_truth`, `$data_source` and `$extra_NAME` for
    each field of extra_info; `$$` stands for a dollar. What the judge says is read by the regular expression `pattern`, whose
    first group is the number, where it matches last; `scale` are the numbers that become 0 and 1, and what lies beyond is cut
    off. `request` holds more fields of the request. The key comes from the environment variable `api_key_env`.

    A judge that does not answer, or answers without a number, fails the response; a number counts as `format` 1.

    Raises:
        RewardError: the template names what is not there.
        ServiceError: no answer after all attempts.
        ValueError: the answer has no number.
    """
    asked = _filled(template, reward_input)
    question = {
        "model": model,
        "messages": [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": asked}],
        "temperature": 0.0,
        **(request or {}),
    }
    service = Service(
        url=f"{base_url.rstrip('/')}/chat/completions",
        api_key=os.environ.get(api_key_env),
        timeout_s=timeout_s,
        max_retries=max_retries,
        retry_wait_s=retry_wait_s,
    )
    said = _content(await service.ask(question), service.url)
    found = re.findall(pattern, said, re.IGNORECASE)
    if not found:
        raise ValueError(f"the judge gave no number that pattern={pattern!r} finds; it said {said[-300:]!r}")
    number = float(found[-1][0] if isinstance(found[-1], tuple) else found[-1])
    low, high = scale
    return {"overall": min(max((number - low) / (high - low), 0.0), 1.0), "said": number}


def conversation_text(messages: Messages) -> str:
    """Messages as text for a judge to read.

    Example:
        >>> print(conversation_text([{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]))
        [user]
        2+2?
        <BLANKLINE>
        [assistant]
        4
    """
    return "\n\n".join(f"[{message['role']}]\n{message.get('content') or ''}" for message in messages)


def _filled(template: str, reward_input: RewardInput) -> str:
    values = {
        "conversation": conversation_text(reward_input["conversation"]),
        "response": reward_input["response"],
        "prompt": reward_input["prompt"],
        "ground_truth": reward_input["ground_truth"],
        "data_source": reward_input["data_source"],
        **{f"extra_{name}": value for name, value in reward_input["extra_info"].items()},
    }
    try:
        return Template(template).substitute(values)
    except (KeyError, ValueError) as error:
        there = ", ".join(f"${name}" for name in values)
        raise RewardError(
            f"the judge's template asks for {error}, which is not there. There are {there}; a dollar is written $$"
        ) from error


def _content(answer: object, url: str) -> str:
    try:
        content = cast("dict[str, list[dict[str, dict[str, str]]]]", answer)["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise ServiceError(f"{url}: the answer is no chat completion: {str(answer)[:300]}") from error
    return content or ""
