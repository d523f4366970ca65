"""Draw a cell: every problem's W chains of L tokens, in batches that are kept one by one.

The seconds of a batch are divided among its chains by what each took of the machine: at every token the larger of its
part of the pool's slots and of the engine's rows. In a batch that fills the memory a chain that holds a quarter pays a
quarter, and one that is cut at l tokens pays for those l.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from sparsekv.engine.llm import LLM
from sparsekv.engine.params import SamplingParams
from sparsekv.evals.problems.base import Problem, Task
from sparsekv.json_lines import Line
from sparsekv.provenance import commit, environment
from sparsekv.scaling.chains import Chain, draw_chains
from sparsekv.studies.scale.cells import Cell
from sparsekv.studies.scale.engines import Engines, prompt_ids
from sparsekv.studies.scale.study import Study


def wanted(study: Study, cell: Cell) -> Line:
    """What the cell's draws must have been drawn with."""
    method = cell.method
    return {
        "cell": cell.name,
        "method": method.name,
        "policy": method.policy,
        "adapter": method.adapter,
        "model": method.model,
        "ratio": cell.ratio,
        "task": cell.task,
        "seed": cell.seed,
        "split": study.split,
        "temperature": study.temperature,
        "top_p": study.top_p,
        "width": study.width,
        "lengths": sorted(study.lengths),
    }


def draw(study: Study, cell: Cell, done: tuple[Line | None, Sequence[Line]], engines: Engines) -> Iterator[list[Line]]:
    """Lines for a cell's file, batch by batch, of the problems that it lacks; what it is drawn with comes first. done:
    what Draws.read gives.

    Raises ValueError for a task without so many problems, or where no engine can be had.
    """
    header, lines = done
    have = {line["problem"] for line in lines}
    left = [problem for problem in study.problem_lists[cell.task] if problem.name not in have]
    if not left:
        return
    llm = engines.get(cell)
    if header is None:
        pool = llm.engine.runner.ragged.pool
        about = {
            "voted": study.task(cell.task).voted,
            "bytes_per_token": pool.page_bytes / pool.page_size * llm.engine.scheduler.ledger.heads,
            "kv_memory": study.kv_memory,
            "rows": study.rows,
        }
        yield [wanted(study, cell) | about | environment(llm.model.device) | {"commit": study.commit or commit()}]
    for i in range(0, len(left), study.batch):
        yield _batch(study, cell, left[i : i + study.batch], llm)


def _batch(study: Study, cell: Cell, problems: list[Problem], llm: LLM) -> list[Line]:
    params = SamplingParams(
        n=study.width, temperature=study.temperature, top_p=study.top_p, max_tokens=study.most_tokens
    )
    prompts = [prompt_ids(llm.tokenizer, problem) for problem in problems]
    began = time.perf_counter()
    drawn = draw_chains(llm, prompts, params, seeds=[_seed(cell.seed, problem) for problem in problems])
    seconds = time.perf_counter() - began
    pool = llm.engine.runner.ragged.pool
    parts = [[_parts(c, slots=pool.pages * pool.page_size, rows=study.rows) for c in chains] for chains in drawn]
    rate = seconds / sum(own[-1] for each in parts for own in each)
    task, lengths, made = study.task(cell.task), sorted(study.lengths), study.commit or commit()
    return [
        _line(task, problem, chains, lengths, [own * rate for own in each], texts=study.scorer is not None)
        | {"commit": made}
        for problem, chains, each in zip(problems, drawn, parts, strict=True)
    ]


def _parts(chain: Chain, *, slots: int, rows: int) -> NDArray[np.float64]:
    """float64 [tokens]: what it took of the machine until each of its tokens."""
    held = np.frombuffer(chain.history.held, dtype=np.int64)[: chain.tokens]
    return np.maximum(held / slots, 1 / rows).cumsum()


def _line(
    task: Task,
    problem: Problem,
    chains: list[Chain],
    lengths: list[int],
    seconds: list[NDArray[np.float64]],
    *,
    texts: bool,
) -> Line:
    answers = [task.extract(chain.text) if chain.ended else None for chain in chains]
    ends = [chain.at(chain.tokens) for chain in chains]
    cuts = [[chain.at(length) for length in lengths] for chain in chains]
    line: Line = {
        "problem": problem.name,
        "tokens": [chain.tokens for chain in chains],
        "ended": [chain.ended for chain in chains],
        "answer": answers,
        "right": [answer is not None and task.right(problem, answer) for answer in answers],
        "seen": [end.tokens_seen for end in ends],
        "held": [round(end.tokens_held, 2) for end in ends],
        "reads": [[round(kv.kv_reads) for kv in cut] for cut in cuts],
        "bounds": [[round(kv.bound_reads) for kv in cut] for cut in cuts],
        "peak": [[round(kv.peak_tokens, 2) for kv in cut] for cut in cuts],
        "seconds": [
            [float(f"{own[min(length, chain.tokens) - 1]:.4g}") for length in lengths]
            for chain, own in zip(chains, seconds, strict=True)
        ],
    }
    if texts:
        line |= {"prompt": problem.prompt, "text": [chain.text for chain in chains]}
    return line


def _seed(seed: int, problem: Problem) -> int:
    """One for each problem, the same for every method and ratio."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{problem.name}".encode()).digest()[:7])
