"""What the shipped adapters cost, as tables: python -m sparsekv.bench.reports.adapters RESULTS.jsonl README.md PAGE.md

The results hold lines of `sparsekv eval --adapter FOLDER --cr 2 ... --tasks passkey --contexts 8192 --json`; what else
is shown comes out of each FOLDER's eval.json, and only of texts and facts that no training used. README.md has the
block `adapters`, PAGE.md `adapters-aims`.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekv.json_lines import Line
from sparsekv.markdown import rewrite, table
from sparsekv.retrofit.card import NEVER_TRAINED, untrained_texts

AIMS = {  # measured ratio -> perplexity over dense, facts kept, pass-keys; of heads alone, of heads with LoRA
    2: ((0.002, 0.003), (1.00, 1.00), (0.98, 0.98)),
    4: ((0.012, 0.010), (0.97, 0.98), (0.92, 0.92)),
    8: ((0.030, 0.025), (0.88, 0.92), (0.80, 0.80)),
    16: ((0.080, 0.060), (0.65, 0.75), (None, None)),
}
NAMES = ("heads alone", "heads and LoRA")
_NOTHING = "-"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one ratio costs an adapter."""

    rises: dict[str, float]
    """Perplexity over dense, by text."""
    facts: float
    """Of those that dense finds."""
    facts_found: int
    """By dense."""
    passkeys: float | None
    """As facts, in the longest texts; None where it was not measured."""

    @property
    def rise(self) -> float:
        """The mean over the texts."""
        return sum(self.rises.values()) / len(self.rises)


def main(arguments: list[str]) -> int:
    """Exit code 2 and one sentence for a user's mistake."""
    return rewrite(
        arguments,
        usage="python -m sparsekv.bench.reports.adapters RESULTS.jsonl README.md PAGE.md",
        blocks=lambda lines: [("adapters", costs(lines)), ("adapters-aims", aims(lines))],
    )


def costs(lines: list[Line]) -> str:
    """A row a ratio, what each adapter costs there."""
    found = _by_name(lines)
    texts = list(next(iter(found.values()))[2].rises)
    head = ["measured ratio"]
    for name in found:
        head += [f"{name}: perplexity over dense, {' / '.join(texts)}", "facts kept", f"pass-keys at {_length(lines)}"]
    rows = []
    for ratio in AIMS:
        row = [str(ratio)]
        for cells in found.values():
            cell = cells[ratio]
            row += [
                " / ".join(f"{rise:+.1%}" for rise in cell.rises.values()),
                f"{cell.facts:.0%}",
                _share(cell.passkeys),
            ]
        rows.append(row)
    return table(head, rows)


def aims(lines: list[Line]) -> str:
    """Where it was measured, and a row for each aim."""
    rows = []
    for which, (name, cells) in enumerate(_by_name(lines).items()):
        for ratio, (rise, facts, passkeys) in AIMS.items():
            cell = cells[ratio]
            what = f"{name}, {ratio}: perplexity over dense, mean"
            rows.append(_aim(what, cell.rise, rise[which], most=True, shown="{:+.1%}"))
            what = f"{name}, {ratio}: facts kept of the {cell.facts_found} that dense finds"
            rows.append(_aim(what, cell.facts, facts[which], most=False, shown="{:.0%}"))
            if cell.passkeys is not None:
                what = f"{name}, {ratio}: pass-keys at {_length(lines)} kept"
                rows.append(_aim(what, cell.passkeys, passkeys[which], most=False, shown="{:.0%}"))
    about = _about(lines)
    return f"{about}\n\n{table(['', 'measured', 'aimed at', ''], rows)}"


def _aim(what: str, value: float, aim: float | None, *, most: bool, shown: str) -> list[str]:
    if aim is None:
        return [what, shown.format(value), _NOTHING, ""]
    met = value <= aim if most else value >= aim
    aimed = f"{shown.format(aim)} or {'less' if most else 'more'}"
    return [what, shown.format(value), aimed, "met" if met else "missed"]


def _by_name(lines: list[Line]) -> dict[str, dict[int, Cell]]:
    if len(lines) != len(NAMES):
        raise ValueError(f"the results hold {len(lines)} lines; one for each of {' and '.join(NAMES)}, in this order")
    return {name: _cells(line) for name, line in zip(NAMES, lines, strict=True)}


def _cells(line: Line) -> dict[int, Cell]:
    results = _evaluation(line)
    kept = {row["cr"]: row["scores"]["kept"]["value"] for row in line["rows"] if row["cr"]}
    return {
        round(score["asked"]): _cell(score, untrained_texts(results), kept.get(score["asked"]))
        for score in results["scores"]
    }


def _cell(score: dict[str, Any], texts: list[str], passkeys: float | None) -> Cell:
    facts = [cell for kind, cell in score["retrieval"].items() if kind in NEVER_TRAINED and cell["dense_right"]]
    whole = sum(cell["dense_right"] for cell in facts)
    return Cell(
        rises={
            name: score["others"][name]["perplexity"] / score["others"][name]["perplexity_dense"] - 1 for name in texts
        },
        facts=sum(cell["kept"] * cell["dense_right"] for cell in facts) / whole,
        facts_found=whole,
        passkeys=passkeys,
    )


def _evaluation(line: Line) -> dict[str, Any]:
    path = Path(line["adapter"]) / "eval.json"
    if not path.is_file():
        raise ValueError(f"there is no {path}; run this where the adapter {line['adapter']} is")
    return json.loads(path.read_text(encoding="utf-8"))


def _about(lines: list[Line]) -> str:
    first = _evaluation(lines[0])
    used, row = first["settings"], lines[0]["rows"][0]
    contexts = ", ".join(f"{context:,}" for context in used["contexts"])
    return (
        f"{first['hardware']}, torch {first['torch']}, commit {first['commit']}, seed {first['seed']}: "
        f"{used['rows']} texts of {used['length']:,} tokens; {used['items']} facts of each kind at {contexts} tokens; "
        f"{row['sequences']} pass-keys at {_length(lines)}, of which dense finds "
        f"{row['scores']['accuracy']['value']:.0%}."
    )


def _length(lines: list[Line]) -> str:
    return f"{lines[0]['rows'][0]['length']:,} tokens"


def _share(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.0%}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
