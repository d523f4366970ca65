"""Benchmarks on small files of the same form as the hub's: prompts, answers, scoring."""

import base64
import csv
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from sparsekv.evals.problems.benchmarks.answers import boxed, choice, normal
from sparsekv.evals.problems.benchmarks.livecodebench import unpacked
from sparsekv.evals.problems.tasks import get

pytest.importorskip("math_verify")


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_aime(tmp_path: Path):
    path = lines(
        tmp_path / "aime.jsonl", [{"problem": "What is $2+2$?", "answer": "004"}, {"problem": "?", "answer": 17}]
    )
    task = get(f"aime24={path}")
    assert (task.name, task.voted) == (f"aime24={path}", True)
    first, second = task.problems("test", 2)
    assert first.prompt.startswith("What is $2+2$?") and "boxed" in first.prompt
    assert task.extract(r"<think>\boxed{5}</think> So \boxed{004}.") == task.extract(r"\boxed{ 4 }") == "4"
    assert task.extract(r"\boxed{\text{four}}") is None
    assert task.extract("the answer is 4") is None
    assert task.right(first, "4") and task.right(second, "17") and not task.right(second, "4")


@pytest.mark.parametrize(
    ("reference", "written", "right"),
    [
        (r"\frac{1}{2}", r"\dfrac{1}{2}", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{1}{2}", "0.51", False),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)", True),
        (r"x^2+2x+1", r"(x+1)^2", True),
        (r"x^2+2x+1", r"(x+2)^2", False),
        (r"\text{Evelyn}", r"Evelyn", True),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        (r"1,250", r"1250", True),
        (r"90^\circ", r"90", True),
        (r"[0,1)", r"[0,1]", False),
        (r"7", r"\frac{", False),
    ],
)
def test_math_500(tmp_path: Path, reference: str, written: str, right: bool):
    task = get(f"math-500={lines(tmp_path / 'math.jsonl', [{'problem': '?', 'answer': reference}])}")
    (problem,) = task.problems("test", 1)
    answer = task.extract(f"Thus \\boxed{{{written}}}.") or ""
    assert task.right(problem, answer) is right


def test_equal_answers_are_equal_texts():
    assert normal(r"\frac{1}{2}") == normal("0.5") == normal(r"\dfrac12") == "1/2"
    assert normal(r"\left(3, \dfrac{\pi}{2}\right)") == normal(r"(3,\frac{\pi}{2})")
    assert boxed(r"\boxed{a} then \boxed{\frac{1}{2}} and \boxed{un") == r"\frac{1}{2}"


def test_gsm8k(tmp_path: Path):
    path = lines(tmp_path / "gsm8k.jsonl", [{"question": "How many?", "answer": "5 * 250 = 1,250\n#### 1,250"}])
    task = get(f"gsm8k={path}")
    (problem,) = task.problems("test", 1)
    assert problem.data["answer"] == "1,250"
    assert task.right(problem, task.extract(r"\boxed{1250}") or "")


def test_gpqa(tmp_path: Path):
    """The right answer stands at each letter in turn, and the letter is that answer's."""
    columns = ["Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
    path = tmp_path / "gpqa.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([columns, *([f"Which, {i}?", "right", "w1", "w2", "w3"] for i in range(24))])
    task = get(f"gpqa-diamond={path}")
    problems = task.problems("test", 24)
    assert {p.data["answer"] for p in problems} == set("ABCD")
    for p in problems:
        assert f"{p.data['answer']}) right" in p.prompt
        assert task.right(p, p.data["answer"]) and not task.right(p, "E")
    assert problems == get(f"gpqa-diamond={path}").problems("test", 24)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Answer: B", "B"),
        ("answer: A ... The answer is (C).", "C"),
        ("<think>Answer: A</think>\n**Answer:** D", "D"),
        (r"so \boxed{B}", "B"),
        (r"so \boxed{\text{C) iron}}", "C"),
        ("Answer: Because", None),
        ("A or B", None),
    ],
)
def test_choice(text: str, letter: str | None):
    assert choice(text.rpartition("</think>")[2], "ABCD") == letter


def packed(tests: list[dict[str, str]]) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


@pytest.fixture
def code(tmp_path: Path) -> Any:
    prints = {
        "question_content": "Print the sum of each line.",
        "starter_code": "",
        "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
        "private_test_cases": packed([{"input": "1 2\n4 5\n", "output": "3.0\n9", "testtype": "stdin"}]),
        "metadata": "{}",
    }
    calls = {
        "question_content": "Add all.",
        "starter_code": "class Solution:\n    def add(self, a: List[int], b: int) -> int:\n        ",
        "public_test_cases": json.dumps([{"input": "[1, 2]\n3", "output": "6", "testtype": "functional"}]),
        "private_test_cases": json.dumps([{"input": "[]\n-1", "output": "-1", "testtype": "functional"}]),
        "metadata": json.dumps({"func_name": "add"}),
    }
    return get(f"livecodebench={lines(tmp_path / 'test.jsonl', [prints, calls])}")


def test_livecodebench(code: Any):
    prints, calls = code.problems("test", 2)
    assert "stdin" in prints.prompt and "class Solution" in calls.prompt
    answer = code.extract(
        "<think>```python\nno\n```</think>\n```python\nfor l in sys.stdin:\n    print(sum(map(int, l.split())))\n```"
    )
    assert code.right(prints, answer)
    assert not code.right(prints, "print(3)")
    head = "class Solution:\n    def add(self, a: List[int], b: int) -> int:\n"
    method = head + "        print('seen')\n        return sum(a) + b"
    assert code.right(calls, method)
    assert not code.right(calls, method.replace("+ b", "- b"))
    assert not code.right(calls, "class Solution: pass")
    assert code.extract("```python\nnever closed") is None


def test_packed_tests_are_texts_only():
    """A pickle that would call something is refused."""

    class Call:
        def __reduce__(self) -> Any:
            return (print, ("called",))

    with pytest.raises(ValueError, match="neither"):
        unpacked(base64.b64encode(zlib.compress(pickle.dumps(Call()))).decode())
    with pytest.raises(ValueError, match="neither"):
        unpacked("no base64!")


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("x.jsonl", '{"problem": "?"}', "no column 'answer'"),
        ("x.jsonl", "", "holds no problems"),
        ("x.jsonl", "{", "damaged"),
        ("x.json", "[1]", "must hold objects"),
        ("x.txt", "", "give one of those"),
    ],
)
def test_mistakes(tmp_path: Path, file: str, content: str, sentence: str):
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=sentence):
        get(f"math-500={tmp_path / file}").problems("test", 1)


def test_no_such_problems(tmp_path: Path):
    task = get(f"math-500={lines(tmp_path / 'm.jsonl', [{'problem': '?', 'answer': '1'}])}")
    with pytest.raises(ValueError, match="has 1 problems"):
        task.problems("test", 2)
    with pytest.raises(ValueError, match="all test"):
        task.problems("train", 1)
    with pytest.raises(ValueError, match="cannot read"):
        get("math-500=/nowhere/x.jsonl").problems("test", 1)
