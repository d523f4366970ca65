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

from sparsekv.evals.perplexity import rise_of
from sparsekv.json_lines import Line
from sparsekv.markdown import rewrite, table
from sparsekv.retrofit.card import untrained_facts, untrained_texts

AIMS = {  # measured ratio -> perplexity over dense, facts kept, pass-keys; of heads alone, of heads with LoRA
    2: ((0.002, 0.003), (1.00, 1.00), (0.98, 0.98)),
    4: ((0.012, 0.010), (0.97, 0.98), (0.92, 0.92)),
    8: ((0.030, 0.025), (0.88, 0.92), (0.80, 0.80)),
    16: ((0.080, 0.060), (0.65, 0.75), (None, None)),
}
NAMES = ("heads alone", "heads and LoRA")


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
                "-" if cell.passkeys is None else f"{cell.passkeys:.0%}",
            ]
        rows.append(row)
    return table(head, rows)


def aims(lines: list[Line]) -> str:
    """Where it was measured, and a row for each aim."""
    rows = []
    for which, (name, cells) in enumerate(_by_name(lines).items()):
        for ratio, (rise, facts, passkeys) in AIMS.items():
            cell = cells[ratio]
            at = f"{name}, {ratio}:"
            aim = rise[which]
            met = "met" if cell.rise <= aim else "missed"
            rows.append([f"{at} perplexity over dense, mean", f"{cell.rise:+.1%}", f"{aim:+.1%} or less", met])
            for what, value, least in (
                (f"facts kept of the {cell.facts_found} that dense finds", cell.facts, facts[which]),
                (f"pass-keys at {_length(lines)} kept", cell.passkeys, passkeys[which]),
            ):
                if value is not None and least is not None:
                    met = "met" if value >= least else "missed"
                    rows.append([f"{at} {what}", f"{value:.0%}", f"{least:.0%} or more", met])
    return f"{_about(lines)}\n\n{table(['', 'measured', 'aimed at', ''], rows)}"


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
    kept, found = untrained_facts(score["retrieval"])
    rises = {name: rise_of(score["others"][name]) for name in texts}
    return Cell(rises=rises, facts=kept / found, facts_found=found, passkeys=passkeys)


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
