"""Calls of a service over HTTP from reward functions: many at once, with retries, in the time that they have."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import httpx

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Answers after which the same question may be answered."""
MOST_WAIT_S = 30.0
MOST_BYTES = 16 << 20
"""Of an answer."""


class ServiceError(Exception):
    """A service has given no answer; the message says which, how often it was asked, and what came in place of one."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """An address that takes JSON by POST and answers JSON."""

    url: str
    api_key: str | None = None
    timeout_s: float = 30.0
    """For one attempt, from the connection to the last byte."""
    max_retries: int = 4
    """Attempts after the first."""
    retry_wait_s: float = 0.5
    """Before the second attempt; it doubles with each, up to 30 s, and is varied by half, so that many do not come at once. A
    service that says when to come again is obeyed."""

    async def ask(self, question: Mapping[str, object]) -> object:
        """The answer.

        Raises:
            ServiceError: there is none after all attempts, or the question is refused.
        """
        problem = ""
        for attempt in range(self.max_retries + 1):
            wait_s = self.retry_wait_s * 2**attempt * random.uniform(0.5, 1.5)
            try:
                async with asyncio.timeout(self.timeout_s):  # httpx's own begins anew with each byte
                    answer = await self._answer(question)
                if answer.status_code == 200:
                    return answer.json()
                problem = f"it answered {answer.status_code}: {answer.text[:300]!r}"
                if answer.status_code not in RETRIED:
                    raise ServiceError(f"{self.url}: {problem}")
                wait_s = max(wait_s, _seconds(answer.headers.get("retry-after")))
            except (TimeoutError, httpx.TimeoutException):
                problem = f"no answer within {self.timeout_s:g} s"
            except httpx.HTTPError as error:
                problem = f"{type(error).__name__}: {error}"
            except ValueError as error:
                problem = f"its answer is no JSON: {error}"
            if attempt < self.max_retries:
                await asyncio.sleep(min(wait_s, MOST_WAIT_S))
        raise ServiceError(f"{self.url}: {problem}, after {self.max_retries + 1} attempts")

    async def _answer(self, question: Mapping[str, object]) -> httpx.Response:
        """What one attempt gives, read to its end."""
        body = bytearray()
        async with _client().stream("POST", self.url, json=question, headers=self._headers(), timeout=self.timeout_s) as answer:
            async for part in answer.aiter_bytes():
                body += part
                if len(body) > MOST_BYTES:
                    raise ServiceError(f"{self.url}: its answer is longer than {MOST_BYTES >> 20} MiB")
        return httpx.Response(
            answer.status_code, headers={"retry-after": answer.headers.get("retry-after", "")}, content=bytes(body)
        )

    def _headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}


@lru_cache(maxsize=1)
def _client() -> httpx.AsyncClient:
    """One for the life of the process, whose connections are kept; all coroutines of a scorer run on one loop."""
    return httpx.AsyncClient(limits=httpx.Limits(max_connections=None, max_keepalive_connections=64), follow_redirects=True)


def _seconds(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:  # a date
        return 0.0
