"""How the reasoning model is spoken to: a problem, a line feed, the chain, the end of text.

A short chat template of its own says so to `LLM.chat`, the studies and the retrofit's chats alike.
"""

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ (bos_token or '') + m['content'] + '\n' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def chat(prompt: str, chain: str) -> dict[str, Any]:
    """A line of a retrofit's JSON lines."""
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": chain}]}


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the engine is given."""
    text = tokenizer.apply_chat_template(chat(prompt, "")["messages"][:1], chat_template=TEMPLATE, tokenize=False)
    return tokenizer(str(text), add_special_tokens=False)["input_ids"]


def encode(prompt: str, chain: str, tokenizer: PreTrainedTokenizerBase, *, ended: bool) -> np.ndarray:
    """int32 [tokens]: a prompt's tokens as their complements ~t, which are negative and not learned, then the chain's.

    ended: whether the end of text follows, or the chain broke off.
    """
    head = np.asarray(prompt_ids(prompt, tokenizer), dtype=np.int32)
    text = chain + (str(tokenizer.eos_token) if ended else "\n")
    tail = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
    return np.concatenate([~head, tail])
