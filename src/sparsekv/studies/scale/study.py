"""A study of chains in one YAML file: which methods at which ratios, on which tasks; how many chains, and how long."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsekv import yaml_file
from sparsekv.engine.config import EngineConfig
from sparsekv.engine.params import SamplingParams
from sparsekv.evals.problems import tasks
from sparsekv.evals.problems.base import Problem, Task
from sparsekv.policies.registry import describe
from sparsekv.scaling.scorer import Scorer
from sparsekv.studies.scale.aims import Aim, parse
from sparsekv.studies.scale.cells import DENSE, Cell, Method

RULES = ("vote", "weighted", "best")


@dataclass(frozen=True, kw_only=True)
class Study:
    """Raises ValueError, one sentence, for an unknown policy or task, an empty grid, or values that measure nothing."""

    model: str
    policies: Any
    """Names, or names with what differs from the study's own: {policy, adapter, model, ratios}."""
    tasks: list[str]
    ratios: list[float] = field(default_factory=list)
    """Of each policy that names none of its own; dense has none."""
    adapter: str | None = None
    """Of each policy with trained heads that names none of its own."""
    seeds: list[int] = field(default_factory=lambda: [0])
    widths: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    """W: chains of a problem."""
    lengths: list[int]
    """L: tokens of a chain."""
    problems: int
    """Of each task."""
    split: str = "test"
    temperature: float = 1.0
    top_p: float = 1.0
    ratio_tokens: int | None = None
    """The length that ratios are meant for, prompt and chain; None = the longest prompt and the largest L."""
    kv_memory: int | str | float | None = None
    """As LLM's: every method has this much."""
    rows: int = 64
    """Chains that run at once, at most."""
    batch: int = 32
    """Problems that are drawn, and kept, at once."""
    enforce_eager: bool = False
    commit: str | None = None
    """This repository's commit, for the results, where the run has no git to ask."""
    rule: str = "vote"
    """What W chains amount to: "vote" (pass@all on tasks that are verified), or with a scorer "weighted" or "best"."""
    scorer: dict[str, Any] | None = None
    """scaling.scorer.Scorer's url, model and so on."""
    aims: list[dict[str, Any]] = field(default_factory=list)
    """What the report is to say whether it was reached: aims.Aim's method, over, budget, mean and voted."""

    def __post_init__(self) -> None:
        for name in ("tasks", "seeds", "widths", "lengths"):
            values = getattr(self, name)
            if not isinstance(values, list) or not values:
                raise ValueError(f"the study's grid is empty: {name} is {values!r}; give a list of one or more")
            if len(set(map(str, values))) < len(values):
                raise ValueError(f"the study's {name} name a value twice: {values}")
        for name in ("widths", "lengths"):
            if not all(isinstance(n, int) and n >= 1 for n in getattr(self, name)):
                raise ValueError(f"the study's {name} are {getattr(self, name)}; use integers of 1 or more")
        for name in ("problems", "batch"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"the study's {name} is {getattr(self, name)!r}; use an integer of 1 or more")
        EngineConfig(kv_memory=self.kv_memory, max_num_seqs=self.rows, max_num_batched_tokens=max(8192, self.rows))
        SamplingParams(temperature=self.temperature, top_p=self.top_p, max_tokens=self.most_tokens)
        if self.rule not in RULES:
            raise ValueError(f"the study's rule is {self.rule!r}; use one of {', '.join(RULES)}")
        if (self.rule == "vote") != (self.scorer is None):
            raise ValueError("the rules weighted and best need a scorer, and vote has none: set both or neither")
        named = {method.name for method in self.methods}
        strange = sorted({name for aim in self.aim_list for name in (aim.method, aim.over)} - named)
        if strange:
            raise ValueError(f"the study aims at methods that it does not have: {', '.join(strange)}; add them")
        assert self.task_list
        self._scorer()

    @property
    def width(self) -> int:
        return max(self.widths)

    @property
    def most_tokens(self) -> int:
        return max(self.lengths)

    @cached_property
    def methods(self) -> list[Method]:
        """As the file names them."""
        named = self.policies if isinstance(self.policies, dict) else dict.fromkeys(self.policies or ())
        if not named:
            raise ValueError("the study's grid is empty: name policies, such as [dense, dms, tova]")
        return [self._method(name, own or {}) for name, own in named.items()]

    @cached_property
    def aim_list(self) -> list[Aim]:
        """The aims themselves."""
        return parse(self.aims)

    @cached_property
    def task_list(self) -> list[Task]:
        """The tasks themselves."""
        return [tasks.get(name) for name in self.tasks]

    def task(self, name: str) -> Task:
        """One of them."""
        return self.task_list[self.tasks.index(name)]

    @cached_property
    def problem_lists(self) -> dict[str, list[Problem]]:
        """By task. Raises ValueError for a task that has not so many."""
        found = {name: self.task(name).problems(self.split, self.problems) for name in self.tasks}
        for name, problems in found.items():
            if len(problems) < self.problems:
                raise ValueError(
                    f"the task {name} has {len(problems)} problems and the study asks for {self.problems}; lower it"
                )
        return found

    def _scorer(self) -> Scorer | None:
        try:
            return None if self.scorer is None else Scorer(**self.scorer)
        except TypeError as error:
            raise ValueError(f"the study's scorer: {_short(error)}") from None

    def make_scorer(self) -> Scorer:
        """The scorer of a rule that has one."""
        made = self._scorer()
        assert made is not None
        return made

    def cells(self) -> Iterator[Cell]:
        """Those that share an engine one after the other."""
        for method in self.methods:
            for ratio in method.ratios:
                for task in self.tasks:
                    for seed in self.seeds:
                        yield Cell(method=method, ratio=ratio, task=task, seed=seed)

    def to_dict(self) -> dict[str, Any]:
        """What a YAML file holds."""
        return asdict(self)

    def _method(self, name: str, own: dict[str, Any]) -> Method:
        unknown = set(own) - {"policy", "adapter", "model", "ratios"}
        if unknown:
            raise ValueError(
                f"the study's policy {name!r} has unknown keys {', '.join(sorted(unknown))}; it takes policy, adapter, "
                "model and ratios"
            )
        policy = own.get("policy", name)
        trained = describe(policy).needs_training
        ratios = (1.0,) if policy == DENSE else tuple(float(r) for r in own.get("ratios", self.ratios))
        if not ratios:
            raise ValueError(f"the study's grid is empty: {name!r} has no ratios; give it some, or the study")
        method = Method(
            name=name,
            policy=policy,
            ratios=ratios,
            adapter=own.get("adapter", self.adapter if trained else None),
            model=own.get("model", self.model),
        )
        for ratio in ratios:
            method.setting(ratio, tokens=2**20)
        return method


def load_study(path: str | Path) -> Study:
    """Raises ValueError for a file that is not such a study."""
    raw = yaml_file.read(path)
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds no study: write keys such as model, policies, tasks, lengths and problems")
    known = [f.name for f in fields(Study)]
    unknown = sorted(str(key) for key in raw if key not in known)
    if unknown:
        raise ValueError(f"{path} has unknown keys: {', '.join(unknown)}; a study has {', '.join(known)}")
    try:
        return Study(**raw)
    except TypeError as error:
        raise ValueError(f"{path}: {_short(error)}") from None


def _short(error: TypeError) -> str:
    return str(error).split("__init__() ")[-1]
