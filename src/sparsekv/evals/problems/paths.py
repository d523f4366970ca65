"""A path that visits each of nine nodes once: random walks until one does not end early. Verified.

    paths                1 a( b d)2 d( e)3 e()            a walk: step, node and the neighbours that are not yet visited
     a: b d       ->     1 c( b)2 b( a)3 a( d)4 d( e)5 e()
     b: a c ...          ans c b a d e

Difficulty: how many random walks it takes on average.
"""

import random
from dataclasses import dataclass
from itertools import pairwise
from math import fsum
from typing import Any, ClassVar

from sparsekv.evals.problems.base import Problem
from sparsekv.evals.problems.procedural import CAP, Procedural, within

NODES = "abcdefghi"
_EDGES = (9, 16)


@dataclass(frozen=True, kw_only=True)
class Paths(Procedural):
    """data: "edges", pairs of nodes such as "ab"."""

    family: ClassVar[str] = "paths"
    voted: ClassVar[bool] = False
    levels: ClassVar[tuple[int, int]] = (4, 64)

    def propose(self, rng: random.Random) -> tuple[str, dict[str, Any]]:
        """A graph with a path of all nodes, and further edges at random."""
        hidden = rng.sample(NODES, len(NODES))
        edges = {_edge(a, b) for a, b in pairwise(hidden)}
        wanted = rng.randint(*_EDGES)
        while len(edges) < wanted:
            edges.add(_edge(*rng.sample(NODES, 2)))
        data = {"edges": sorted(edges)}
        rows = [f" {a}:{_listed(near)}" for a, near in _neighbours(data).items()]
        return "paths\n" + "\n".join(rows), data

    def fits(self, data: dict[str, Any]) -> bool:
        """By the chance that a random walk succeeds, exactly."""
        near = _neighbours(data)
        chance = fsum(_success(near, (start,)) for start in NODES) / len(NODES)
        return within(self.level, 1 / chance)

    def written(self, problem: Problem) -> str:
        """Walks that choose uniformly."""
        rng = random.Random(f"written/{problem.name}")
        near = _neighbours(problem.data)
        lines: list[str] = []
        while sum(map(len, lines)) < 2 * CAP:  # a blank and its letter are one token
            walk, line = rng.choice(NODES), ""
            while True:
                options = [x for x in near[walk[-1]] if x not in walk]
                line += f"{len(walk)} {walk[-1]}({_listed(options)})"
                if not options:
                    break
                walk += rng.choice(options)
            lines.append(line)
            if len(walk) == len(NODES):
                return "\n".join([*lines, f"ans{_listed(walk)}"])
        return "\n".join(lines)

    def right(self, problem: Problem, answer: str) -> bool:
        """Whether "c b a d e ..." names every node once, and neighbours in a row."""
        walk, edges = answer.split(), set(problem.data["edges"])
        return sorted(walk) == list(NODES) and all(_edge(a, b) in edges for a, b in pairwise(walk))


def _edge(a: str, b: str) -> str:
    return min(a, b) + max(a, b)


def _neighbours(data: dict[str, Any]) -> dict[str, list[str]]:
    return {a: [b for b in NODES if _edge(a, b) in data["edges"]] for a in NODES}


def _success(near: dict[str, list[str]], walk: tuple[str, ...]) -> float:
    if len(walk) == len(NODES):
        return 1.0
    options = [x for x in near[walk[-1]] if x not in walk]
    return fsum(_success(near, (*walk, x)) for x in options) / len(options) if options else 0.0  # in any Python alike


def _listed(nodes: Any) -> str:
    return "".join(f" {x}" for x in nodes)
