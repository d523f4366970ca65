"""SamplingParams: how a request is sampled, with vLLM's names and meanings."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from sparsekv.engine.checks import check_int, check_number
from sparsekv.engine.thinking import ThinkingBudget

GREEDY_BELOW = 1e-5
"""Temperatures below it are greedy, as in vLLM: the quotient would leave float32."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """One request's sampling. Raises ValueError, one sentence that names the field, for values out of range."""

    n: int = 1
    """Samples of one prompt, which is prefilled once. All differ, also with a seed."""
    temperature: float = 1.0
    """0 (and what is below 1e-5) = greedy."""
    top_p: float = 1.0
    """The smallest set of tokens whose probability reaches top_p; 1 = all."""
    top_k: int = 0
    """The top_k most probable tokens; 0 or -1 = all."""
    min_p: float = 0.0
    """Tokens with at least min_p times the probability of the most probable; 0 = all."""
    repetition_penalty: float = 1.0
    """Logits of tokens in the prompt or the output are divided by it if positive, else multiplied; 1 = off."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output once for each occurrence."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these token ids, before everything else."""
    stop: str | list[str] | None = None
    """The text ends before the first of these."""
    stop_token_ids: list[int] | None = None
    """Tokens that end the sample, like the end-of-text token; they stay in token_ids."""
    logprobs: int | None = None
    """Log-probabilities of the sampled token and of this many most probable ones, of the model's own distribution
    (before penalties and temperature); None = none."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt but its first, given what stands before it; None = none."""
    max_tokens: int | None = 16
    """Tokens to generate at most; None = up to the model's context."""
    min_tokens: int = 0
    """Before so many tokens, those that would end the sample are not sampled."""
    ignore_eos: bool = False
    """Go on after the end-of-text token."""
    seed: int | None = None
    """Sample i at position t draws a number that depends on (seed, i, t) alone; None = a fresh seed."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    detokenize: bool = True
    """Text out; False leaves `text` empty and saves the work."""
    thinking: ThinkingBudget | None = None
    """Force the end of the thought after so many tokens; None = let it end by itself."""
    stops: tuple[str, ...] = field(init=False, repr=False, default=())
    """`stop` as a tuple."""
    longest_stop: int = field(init=False, repr=False, default=1)
    """Characters of the longest of them, 1 without any."""

    def __post_init__(self) -> None:
        check_int("n", self.n, at_least=1)
        check_number("temperature", self.temperature, low=0.0)
        if self.temperature < GREEDY_BELOW:
            object.__setattr__(self, "temperature", 0.0)
        check_number("top_p", self.top_p, low=0.0, high=1.0)
        if self.top_p == 0:
            raise ValueError("top_p is 0; use a number above 0, or temperature=0 for greedy")
        check_int("top_k", self.top_k, at_least=-1)
        check_number("min_p", self.min_p, low=0.0, high=1.0)
        check_number("repetition_penalty", self.repetition_penalty, low=0.0)
        if self.repetition_penalty == 0:
            raise ValueError("repetition_penalty is 0; use a number above 0, where 1 is off")
        check_number("presence_penalty", self.presence_penalty, low=-2.0, high=2.0)
        check_number("frequency_penalty", self.frequency_penalty, low=-2.0, high=2.0)
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens, at_least=1)
        check_int("min_tokens", self.min_tokens, at_least=0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}; lower it")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), at_least=0)
        if self.seed is not None:
            check_int("seed", self.seed, at_least=None)
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if not all(isinstance(text, str) and text for text in stops):
            raise ValueError("stop holds something that is not a text; use non-empty strings")
        if stops and not self.detokenize:
            raise ValueError("stop strings need the text; leave detokenize at True, or use stop_token_ids")
        object.__setattr__(self, "stops", stops)
        object.__setattr__(self, "longest_stop", max(map(len, stops), default=1))
        for token, bias in (self.logit_bias or {}).items():
            check_int("a token of logit_bias", token, at_least=0)
            check_number(f"logit_bias[{token}]", bias, low=-math.inf)
        if not isinstance(self.stop_token_ids, list | tuple | None):
            raise ValueError(f"stop_token_ids is {self.stop_token_ids!r}; use a list of token ids")
        for token in self.stop_token_ids or ():
            check_int("stop_token_ids", token, at_least=0)
        if self.thinking is not None and self.max_tokens is not None:
            needed = self.thinking.tokens + len(self.thinking.end)
            if self.max_tokens <= needed:
                raise ValueError(
                    f"max_tokens {self.max_tokens} leaves no room for an answer after {needed} tokens of thought and "
                    "its end marker; raise it or lower the thinking budget"
                )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        """Whether the tokens so far change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def filtered(self) -> bool:
        """Whether some tokens are cut off before sampling."""
        return not self.greedy and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)
