"""What the tests of the retrofit share: a run's parts, and a run."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsekv.modeling import contexts
from sparsekv.retrofit.config import RetrofitConfig
from sparsekv.retrofit.data.documents import read_all
from sparsekv.retrofit.data.rows import Blend, blend
from sparsekv.retrofit.run import load_for_training, load_teacher
from sparsekv.retrofit.training.trainer import RetrofitTrainer, train

Configure = Callable[..., RetrofitConfig]


def prepared(config: RetrofitConfig) -> tuple[Any, Blend, Any]:
    """(student, rows, teacher)"""
    model, tokenizer = load_for_training(config)
    documents = read_all(config.data, tokenizer, model=config.model, seed=config.seed)
    rows = blend(documents, tokenizer, count=config.steps * config.batch, length=config.length, seed=config.seed)
    Path(config.output).mkdir(parents=True, exist_ok=True)
    return model, rows, load_teacher(config, tokenizer)


def trained(config: RetrofitConfig) -> tuple[Any, list[dict[str, Any]]]:
    model, rows, teacher = prepared(config)
    train(model, rows, config, teacher=teacher, progress=False)
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    return model, [json.loads(line) for line in lines]


@contextmanager
def trainer_of(config: RetrofitConfig) -> Iterator[RetrofitTrainer]:
    model, rows, teacher = prepared(config)
    with contexts.soft(model, tau=config.tau):
        yield RetrofitTrainer(model, rows, config, teacher=teacher, progress=False)
