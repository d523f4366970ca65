"""What a study is to show: by how many points one method is to be ahead of another at equal budgets."""

from dataclasses import dataclass, fields
from typing import Any

from sparsekv.studies.scale.cells import BUDGETS


@dataclass(frozen=True, kw_only=True)
class Aim:
    """`mean` points over all tasks, `voted` over the voted ones alone, each with an interval that excludes zero.

    Raises ValueError for a budget that is none.
    """

    method: str
    over: str
    budget: str
    mean: float
    voted: float | None = None

    def __post_init__(self) -> None:
        if self.budget not in BUDGETS:
            raise ValueError(f"the study aims at equal {self.budget!r}; use one of {', '.join(BUDGETS)}")


def parse(raw: Any) -> list[Aim]:
    """Of a study's file. Raises ValueError, one sentence, for what is no list of aims."""
    known = [f.name for f in fields(Aim)]
    try:
        return [Aim(**each) for each in raw]
    except TypeError:
        raise ValueError(
            f"the study's aims are {raw!r}; give a list of mappings with the keys {', '.join(known)}, voted if wanted"
        ) from None
