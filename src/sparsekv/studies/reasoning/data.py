"""The training data: written-out chains of every family, in equal numbers a difficulty, made by several processes.

OUT/train.npz   ids int32 [tokens], as chats.encode gives them, and offsets int64 [chains + 1], in random order
OUT/chats.jsonl some of the chains that have an answer, as chats
OUT/data.json   how many chains and tokens each family has
What is made depends on the configuration alone, not on the processes.
"""

import json
import multiprocessing
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from sparsekv.evals.problems.tasks import procedural
from sparsekv.modeling.load import load_tokenizer
from sparsekv.studies.reasoning.chats import chat, encode
from sparsekv.studies.reasoning.config import FamilyConfig, ReasoningConfig
from sparsekv.studies.runner import Say

TRAIN, CHATS, SUMMARY = "train.npz", "chats.jsonl", "data.json"
_SHARD = 64
"""Chains of a process's piece of work."""


@dataclass(frozen=True)
class Chain:
    """One document."""

    ids: np.ndarray
    chat: dict[str, Any] | None
    """None where the chain has no answer."""


def make(config: ReasoningConfig, out: Path, *, processes: int, say: Say) -> None:
    """Write the data, unless it is there. Raises ValueError where the model has no tokenizer."""
    if (out / SUMMARY).exists():
        say(f"{out} holds data already")
        return
    load_tokenizer(config.model)  # is fetched once
    out.mkdir(parents=True, exist_ok=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    total = sum(family.share for family in config.families)
    chains: list[Chain] = []
    summary: dict[str, Any] = {}
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for family in config.families:
            found = list(_up_to(config.tokens * family.share / total, _chains(config, family, pool, processes)))
            tokens = sum(len(chain.ids) for chain in found)
            summary[family.family] = {"chains": len(found), "tokens": tokens}
            say(f"{family.family}: {len(found)} chains, {tokens} tokens")
            chains += found
    random.Random(config.seed).shuffle(chains)
    offsets = np.cumsum([0, *(len(chain.ids) for chain in chains)], dtype=np.int64)
    np.savez(out / TRAIN, ids=np.concatenate([chain.ids for chain in chains]), offsets=offsets)
    chats = [chain.chat for chain in chains if chain.chat is not None][: config.chats]
    (out / CHATS).write_text("".join(json.dumps(line) + "\n" for line in chats), encoding="utf-8")
    (out / SUMMARY).write_text(json.dumps({"config": config.to_dict(), "families": summary}, indent=1) + "\n")


def read(out: Path) -> list[np.ndarray]:
    """The documents. Raises ValueError where `make` has not been there."""
    if not (out / SUMMARY).exists():
        raise ValueError(f"{out} holds no data; make it with python -m sparsekv.studies.reasoning data")
    found = np.load(out / TRAIN)
    return np.split(found["ids"], found["offsets"][1:-1])


def _chains(config: ReasoningConfig, family: FamilyConfig, pool: Any, processes: int) -> Iterator[Chain]:
    """Without end, in the order of their numbers."""
    first = 0
    while True:
        starts = range(first, first + 2 * processes * _SHARD, _SHARD)
        for found in pool.imap(_shard, [(config, family, start) for start in starts]):
            yield from found
        first = starts.stop


def _up_to(tokens: float, chains: Iterator[Chain]) -> Iterator[Chain]:
    while tokens > 0:
        chain = next(chains)
        tokens -= len(chain.ids)
        yield chain


def _shard(job: tuple[ReasoningConfig, FamilyConfig, int]) -> list[Chain]:
    config, family, first = job
    tokenizer = _tokenizer(config.model)
    found = []
    for number in range(first, first + _SHARD):
        task = procedural(family.family, family.levels[number % len(family.levels)])
        problem = task.problem("train", number)
        chain = task.written(problem)
        ended = task.extract(chain) is not None
        ids = encode(problem.prompt, chain, tokenizer, ended=ended)
        if len(ids) <= config.length:
            found.append(Chain(ids, chat(problem.prompt, chain) if ended else None))
    return found


@cache
def _tokenizer(model: str) -> Any:
    return load_tokenizer(model)
