"""Procedural problems: splits that share nothing, chains that are right, verifiers that believe nothing."""

import pytest

from sparsekv.evals.problems.base import Problem
from sparsekv.evals.problems.procedural import SPLITS, split_of
from sparsekv.evals.problems.tasks import get, procedural

NAMES = ["countdown-8", "largest-8", "paths-6", "program-12", "program-60", "times-2", "times-7", "sums-3"]
WRONG = ["", "0", "-1", "1/0", "a b c", "3+4=7", "9" * 400, "1=1=1", ",,,", "٣", "a a a a a a a a a"]


@pytest.mark.parametrize("name", NAMES)
def test_splits(name: str):
    """No prompt of one split is one of another, and the first few are the first of many."""
    task = get(name)
    assert task.name == name
    found = {split: task.problems(split, 12) for split in SPLITS}
    for split, problems in found.items():
        assert len({p.prompt for p in problems}) == len(problems) == 12
        assert all(split_of(p.prompt) == split and p.task == name for p in problems)
        assert task.problems(split, 5) == problems[:5]
    assert len({p.name for problems in found.values() for p in problems}) == 36


@pytest.mark.parametrize("name", NAMES)
def test_written_chains_are_right(name: str):
    """Of a search's chains some give up; none ends in a wrong answer, where the family is certain."""
    family, level = name.split("-")
    task = procedural(family, int(level))
    problems = task.problems("train", 10)
    chains = [task.written(p) for p in problems]
    answers = [task.extract(chain) for chain in chains]
    assert chains == [task.written(p) for p in problems]
    if task.certain:
        assert all(task.right(p, a) for p, a in zip(problems, answers, strict=True) if a is not None)
    assert sum(a is not None for a in answers) >= (10 if task.voted else 5)
    assert all(task.extract("".join(chain.splitlines(keepends=True)[:-1])) is None for chain in chains)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_answers(name: str):
    """Neither junk nor another problem's answer is right."""
    task = get(name)
    family, level = name.split("-")
    first, *others = task.problems("validation", 6)
    made = procedural(family, int(level))
    taken = [task.extract(made.written(p)) for p in others]
    assert not any(task.right(first, text) for text in WRONG)
    assert not any(task.right(first, a) for a in taken if a is not None and a != first.data.get("answer"))


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("4-2=2,20*3=60,2+60=62", True),
        ("20*3=60,4-2=2,60+2=62", True),
        ("4-2=2,3*20=60,60+2=62", True),
        ("20*3=60,4-2=2,60+2=63", False),  # reckoned wrong
        ("20*3=60,60+2=62", False),  # a number is left
        ("20+2=22,22*3=66,66-4=63", False),
        ("20*3=60,60-4=56,2+2=4,56+4=60", False),  # a number is used twice
        ("20*3=60,20+42=62,4-2=2", False),
        ("4/0=0,20*3=60,2+60=62", False),
    ],
)
def test_countdown_verifies(answer: str, right: bool):
    problem = Problem(task="countdown-8", name="x", prompt="", data={"numbers": [2, 3, 4, 20], "target": 62})
    assert get("countdown-8").right(problem, answer) is right


def test_unknown_names():
    for name in ("chess-3", "countdown", "countdown-3000", "program-", "times-99"):
        with pytest.raises(ValueError, match=r"(use one of|has difficulties)"):
            get(name)
    with pytest.raises(ValueError, match="no split"):
        get("times-4").problems("dev", 1)
    with pytest.raises(ValueError, match="distinct"):
        get("times-2").problems("test", 1000)
