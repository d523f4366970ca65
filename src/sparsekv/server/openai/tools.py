"""Tool calls in an answer's text, in the form that Qwen, Hermes and many others write:

<tool_call>
{"name": "weather", "arguments": {"city": "Paris"}}
</tool_call>
"""

import json
from dataclasses import dataclass
from typing import Any

BEGIN, END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, kw_only=True)
class Call:
    name: str
    arguments: str
    """JSON."""


def split(text: str, *, final: bool) -> tuple[str, list[Call]]:
    """What is said, and the calls. Of a text that still grows (not final) what may belong to a call is held back, so
    that neither ever shrinks. A block that is no call stays text."""
    said, calls, rest = "", list[Call](), text
    while True:
        before, begun, after = rest.partition(BEGIN)
        if not begun:
            held = 0 if final else _may_begin(before)
            return _shown(said + before[: len(before) - held], calls, final=final), calls
        said += before
        inside, ended, rest = after.partition(END)
        if not ended:
            said += BEGIN + inside if final else ""
            return _shown(said, calls, final=final), calls
        call = _call(inside)
        if call is None:
            said += BEGIN + inside + END
        else:
            calls.append(call)


def _may_begin(text: str) -> int:
    """How many of the last characters may be the start of a call."""
    return next((n for n in range(len(BEGIN) - 1, 0, -1) if text.endswith(BEGIN[:n])), 0)


def _shown(said: str, calls: list[Call], *, final: bool) -> str:
    """Without the line breaks around calls, which are no text."""
    return said if final and not calls else said.rstrip()


def _call(inside: str) -> Call | None:
    try:
        found: Any = json.loads(inside)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    return Call(name=found["name"], arguments=json.dumps(found.get("arguments", {}), ensure_ascii=False))
