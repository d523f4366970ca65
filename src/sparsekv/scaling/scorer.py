"""Best of n: a process reward model behind HTTP says how good each chain is.

The protocol is that of vLLM's /pooling: POST {"model": ..., "messages": [user, assistant]}; the reply's data[0].data
holds one score a step, or a pair or more of which the last is the probability that the step is right. A chain's score
is that of its worst step ("min"), of its last ("last"), or the product of all ("product").
"""

import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

REDUCE = {"min": min, "last": lambda steps: steps[-1], "product": math.prod}


class ScorerError(ValueError):
    """The scorer did not answer, or not with scores."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Raises ValueError for values that no scorer has."""

    url: str
    """Of the endpoint, such as http://localhost:8000/pooling."""
    model: str
    reduce: str = "min"
    tries: int = 4
    pause: float = 1.0
    """Seconds before the second try, doubled before each further one."""
    timeout: float = 60.0
    """Seconds."""
    parallel: int = 16
    """Requests at once."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"the scorer's url is {self.url!r}; give one that begins with http:// or https://")
        if self.reduce not in REDUCE:
            raise ValueError(f"the scorer's reduce is {self.reduce!r}; use one of {', '.join(REDUCE)}")
        if self.tries < 1 or self.parallel < 1:
            raise ValueError("the scorer's tries and parallel are 1 or more")

    def scores(self, chains: Sequence[tuple[str, str]]) -> list[float]:
        """One for each (problem, chain of thought). Raises ScorerError, one sentence, after the last try."""
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(self._score, chains))

    def _score(self, chain: tuple[str, str]) -> float:
        problem, text = chain
        messages = [{"role": "user", "content": problem}, {"role": "assistant", "content": text}]
        body = json.dumps({"model": self.model, "messages": messages}).encode()
        reply = self._post(body)
        try:
            steps = [_last(step) for step in reply["data"][0]["data"]]
            value = float(REDUCE[self.reduce](steps))
        except (KeyError, IndexError, TypeError, ValueError):
            raise ScorerError(f"the scorer at {self.url} answers without data[0].data of numbers") from None
        if not math.isfinite(value):
            raise ScorerError(f"the scorer at {self.url} gives a score of {value}")
        return value

    def _post(self, body: bytes) -> Any:
        headers, reason = {"Content-Type": "application/json"}, ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                request = urllib.request.Request(self.url, body, headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}"
                if error.code < 500 and error.code not in (408, 429):
                    raise ScorerError(f"the scorer at {self.url} refuses the request with {reason}") from None
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", error))
            except json.JSONDecodeError:
                reason = "no JSON"
        raise ScorerError(
            f"the scorer at {self.url} did not answer in {self.tries} tries ({reason}); start it and go on"
        )


def best(answers: Sequence[str | None], scores: Sequence[float]) -> int | None:
    """Which chain has the highest score of those with an answer, the first of equals; None where none has one."""
    standing = [i for i, answer in enumerate(answers) if answer is not None]
    return max(standing, key=lambda i: scores[i], default=None)


def _last(step: Any) -> float:
    return float(step[-1] if isinstance(step, list) else step)
