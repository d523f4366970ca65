"""Largest sums: what an answer is, what a written chain does, and that chains are wrong in ways that a vote mends."""

import re
from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from sparsekv.evals.problems import largest
from sparsekv.evals.problems.tasks import procedural

_LOOK = re.compile(r"([0-9]{2})\+([0-9]{2})\+([0-9]{2})=([0-9]+) ([0-9]+) ([0-9]+)")


def test_the_answer():
    """By brute force over what the prompt says; a quarter of the sums fit, and a quarter are not below the bound."""
    task = procedural("largest", 12)
    for problem in task.problems("train", 50):
        found = re.fullmatch(r"largest ([0-9,]+)<=([0-9]+) 12", problem.prompt)
        assert found
        numbers, bound = [int(x) for x in found[1].split(",")], int(found[2])
        assert len(numbers) == 8
        assert all(10 <= a < b <= 99 for a, b in pairwise(numbers))
        sums = [sum(three) for three in combinations(numbers, 3)]
        fit = [x for x in sums if x <= bound]
        assert len(sums) == 56
        assert len(fit) >= 14
        assert sum(x >= bound for x in sums) >= 14
        assert [x for x in range(bound + 1) if task.right(problem, str(x))] == [max(fit)]


@pytest.mark.parametrize("level", [8, 24])
def test_each_line(level: int):
    """Looks at three of the numbers, the best of those that fit, the looks since; the end when the patience is over."""
    task = procedural("largest", level)
    for problem in task.problems("train", 30):
        *lines, end = task.written(problem).splitlines()
        best = misses = 0
        for line in lines:
            assert misses < level
            found = _LOOK.fullmatch(line)
            assert found
            a, b, c, total, *account = map(int, found.groups())
            assert a < b < c
            assert {a, b, c} <= set(problem.data["numbers"])
            assert total == a + b + c
            better = best < total <= problem.data["bound"]
            best, misses = (total, 0) if better else (best, misses + 1)
            assert account == [best, misses]
        assert misses == level
        assert end == f"ans {best}"


def test_a_long_chain_gives_up(monkeypatch: pytest.MonkeyPatch):
    """The look that reaches CAP is the last one, and there is no answer."""
    task = procedural("largest", 24)
    problem = task.problem("train", 0)
    whole = task.written(problem)
    monkeypatch.setattr(largest, "CAP", 100)
    chain = task.written(problem)
    assert whole.startswith(chain)
    assert task.extract(chain) is None
    assert 100 <= len(f"{chain}\n") < 100 + len("12+41+60=113 113 10\n")


def test_a_vote_mends_what_chains_miss():
    """At patience 24 a chain alone is right half of the time, sixteen together far more often."""
    task = procedural("largest", 24)
    alone = together = 0.0
    problems = task.problems("validation", 200)
    for problem in problems:
        names = [f"{problem.name}/{n}" for n in range(16)]
        answers = [task.extract(task.written(replace(problem, name=name))) or "" for name in names]
        alone += sum(task.right(problem, a) for a in answers) / len(answers)
        together += task.right(problem, Counter(answers).most_common(1)[0][0])
    assert 0.4 < alone / len(problems) < 0.7
    assert together / len(problems) > alone / len(problems) + 0.2
