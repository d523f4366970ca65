"""What the demo asks: an article with one fact hidden in it, the text that follows, and a question about the fact.

    article ... fact ... article | article goes on | question -> answer
    context                      | continuation    | question

The article is held out from training (assets/texts.py); the seed picks the article and the fact.
"""

import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEPTH = 0.3
"""Where in the context the fact lies, as a share of it."""
_PLACES = ("Harlow observatory", "Lindgren archive", "Corvane lighthouse", "Ostrel museum", "Pellworth greenhouse")


@dataclass(frozen=True, kw_only=True)
class Task:
    """Tensors are int64 [1, tokens]."""

    title: str
    fact: str
    question: str
    answer: str
    context: Tensor
    continuation: Tensor
    ask: Tensor
    """The question and the beginning of its answer."""

    def is_right(self, text: str) -> bool:
        """Whether what the model says first is the answer."""
        return re.match(rf"\W*{self.answer}\b", text) is not None


def make_task(
    tokenizer: "PreTrainedTokenizerBase", articles: list[str], *, seed: int, context: int, continuation: int
) -> Task:
    """The task of a seed: `context` tokens to read, `continuation` more to predict.

    Raises ValueError where no article is long enough.
    """
    rng = random.Random(seed)
    needed = context + continuation
    longest = sorted(articles, key=len, reverse=True)
    candidates = [a for a in longest if len(tokenizer(a[: 8 * needed])["input_ids"]) >= needed]
    if not candidates:
        raise ValueError(f"no article has {needed} tokens; ask for fewer")
    article = rng.choice(candidates)
    place, answer = rng.choice(_PLACES), str(rng.randrange(10_000, 100_000))
    lead = f"The access code of the {place} is"
    fact = f"{lead} {answer}."
    question = f"What is the access code of the {place}?"
    ids = torch.tensor([tokenizer(_hide(article, fact, tokenizer, context))["input_ids"][:needed]])
    ask = f"\n\nQuestion: {question}\nAnswer: {lead}"
    return Task(
        title=article.split("\n", 1)[0],
        fact=fact,
        question=question,
        answer=answer,
        context=ids[:, :context],
        continuation=ids[:, context:],
        ask=torch.tensor([tokenizer(ask, add_special_tokens=False)["input_ids"]]),
    )


def _hide(article: str, fact: str, tokenizer: "PreTrainedTokenizerBase", context: int) -> str:
    """The article with the fact after the first sentence that ends beyond DEPTH of the context."""
    depth = len(tokenizer.decode(tokenizer(article)["input_ids"][: int(DEPTH * context)], skip_special_tokens=True))
    end = re.compile(r"(?<=[.!?])\s").search(article, depth)
    at = end.start() if end else depth
    return f"{article[:at]} {fact}{article[at:]}"
