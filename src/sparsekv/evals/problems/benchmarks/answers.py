r"""Where an answer stands in a chain of thought, and its normal form. math-verify compares answers in mathematics.

The answer is what follows the thoughts: the last \boxed{...} after </think>.
"""

import re
import threading
from typing import Any

_THOUGHTS = "</think>"
_NOISE = re.compile(r"\\left|\\right|\\displaystyle|\\!|\\,|\\;|\\ |\\quad|\\\$|\$|~|\s+")
_SECONDS = 5
"""For one answer's algebra."""


def after_thoughts(text: str) -> str:
    """What a chain says once it has thought: all of it, where it has no thoughts that are marked so."""
    return text.rpartition(_THOUGHTS)[2]


def boxed(text: str) -> str | None:
    r"""What stands in the last whole \boxed{...}."""
    at = text.rfind(r"\boxed")
    while at >= 0:
        start = text.find("{", at)
        depth = 0
        for place in range(start, len(text)) if start >= 0 else ():
            depth += (text[place] == "{") - (text[place] == "}")
            if depth == 0:
                return text[start + 1 : place].strip() or None
        at = text.rfind(r"\boxed", 0, at)
    return None


def normal(answer: str) -> str:
    """An answer such that most equal ones are equal texts: a number's value, or LaTeX without what does not show."""
    value = next((x for x in _parse(answer) if getattr(x, "is_Rational", False)), None)
    if value is not None:
        return str(value)
    text = _NOISE.sub("", re.sub(r"\\(?:text|mathrm|textbf|mbox)\{([^{}]*)\}", r"\1", answer))
    return re.sub(r"\\[dt]frac", r"\\frac", text).rstrip(".,").replace("^{\\circ}", "").replace("^\\circ", "")


def equal(reference: str, answer: str) -> bool:
    """Whether two answers are the same in mathematics."""
    if normal(reference) == answer or reference == answer:
        return True
    from math_verify import verify

    return bool(verify(_parse(reference), _parse(answer), timeout_seconds=_limit()))


def choice(text: str, letters: str) -> str | None:
    r"""The last letter that a text gives as its answer: \boxed{B}, or "Answer: B"."""
    inside = boxed(text)
    if inside is not None:
        found = re.fullmatch(rf"\W*(?:\\text\w*\{{)?\W*([{letters}])\b.*", inside, re.DOTALL)
        if found:
            return found[1]
    stated = re.findall(rf"(?i:answer)\s*(?:is|:)?\**\s*:?\s*\**\(?([{letters}])\b", text)
    return stated[-1] if stated else None


def _parse(answer: str) -> list[Any]:
    try:
        from math_verify import parse
    except ImportError:
        raise ValueError("answers in mathematics need math-verify; run pip install 'sparsekv[eval]'") from None
    return parse(f"${answer}$", parsing_timeout=_limit())  # pyright: ignore[reportArgumentType]


def _limit() -> int | None:
    """math-verify stops by a signal, which only a process's main thread gets."""
    return _SECONDS if threading.current_thread() is threading.main_thread() else None
