"""The guessing game played by an agent that knows an OpenAI client and an address, and nothing of training.

python -m hybridflow.train configs/guessing.yaml environment.path=examples/environments/guessing_agent.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openai import AsyncOpenAI

NUM_GUESSES = 4


async def run(row: Mapping[str, Any], address: str) -> float:
    """One game; the reward is 1 for the right digit."""
    secret, messages = str(row["ground_truth"]), list(row["messages"])
    async with AsyncOpenAI(base_url=address, api_key="unused") as client:
        for _ in range(NUM_GUESSES):
            answer = await client.chat.completions.create(model="policy", messages=messages)
            said = answer.choices[0].message.content or ""
            if said.strip() == secret:
                return 1.0
            is_digit = len(said.strip()) == 1 and said.strip() in "0123456789"
            hint = ("higher" if said.strip() < secret else "lower") if is_digit else "digit?"
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": hint}]
    return 0.0
