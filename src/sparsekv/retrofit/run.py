"""A whole retrofit: train, calibrate, evaluate, write the adapter's folder. Each stage is kept, so that a run that was
stopped goes on where it was.

    output/ adapter_config.json, adapter_model.safetensors   the product
            config.yaml, metrics.jsonl, eval.json, README.md  how it was made, and what it costs
            checkpoints/                                      until the run is complete
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekv.evals.calibrate import fill_table
from sparsekv.evals.corpus import Corpus, other_documents
from sparsekv.evals.evaluate import Point, Score, describe, evaluate
from sparsekv.json_lines import read_lines
from sparsekv.modeling.adapter import CONFIG_FILE, read_adapter
from sparsekv.modeling.attach import attach
from sparsekv.modeling.dial import serves
from sparsekv.modeling.load import load_model, load_tokenizer
from sparsekv.modeling.tensor_parallel import check_shared
from sparsekv.provenance import environment
from sparsekv.retrofit.card import model_card
from sparsekv.retrofit.config import RetrofitConfig, load_config, save_config
from sparsekv.retrofit.data.config import describe_data, texts_of
from sparsekv.retrofit.data.documents import Documents, read_all
from sparsekv.retrofit.data.documents import held_out as held_out_of
from sparsekv.retrofit.data.rows import blend
from sparsekv.retrofit.export import MODEL_FOLDER, export
from sparsekv.retrofit.training.checkpoint import CHECKPOINTS, told
from sparsekv.retrofit.training.metrics import METRICS_FILE, total_seconds
from sparsekv.retrofit.training.trainer import adapter_config, train

CONFIG_COPY, EVAL_FILE, CARD_FILE = "config.yaml", "eval.json", "README.md"

Say = Callable[[str], None]


def run(config: RetrofitConfig, *, say: Say = lambda text: print(text, file=sys.stderr, flush=True)) -> Path:
    """Make or finish the adapter that `config` describes; returns its folder. Where several processes run it together,
    as `accelerate launch` starts them, all train and the first does the rest.

    Raises ValueError, before anything is trained, for an output folder that holds a finished adapter or another run, a
    model or text that cannot be had, and settings that do not fit them.
    """
    processes = PartialState(cpu=config.device == "cpu" or not torch.cuda.is_available())
    say = say if processes.is_main_process else lambda text: None
    output = prepare_output(config)
    with processes.main_process_first():  # which downloads what the others find
        check_processes(config, processes.num_processes)
        documents = read_all(config.data, load_tokenizer(config.model), model=config.model, seed=config.seed)
    held_out = held_out_of(documents)
    trained = (output / CONFIG_FILE).exists()
    processes.wait_for_everyone()
    if not trained:
        _train(documents, config, say=say)
    processes.wait_for_everyone()
    processes.destroy_process_group()  # a process that ends within it may be aborted, and the launcher then ends all
    if not processes.is_main_process:
        return output
    model, tokenizer = load_result(config)
    adapter = read_adapter(output)[0]
    if not adapter.offsets:
        say(f"Calibrating at {config.calibration.length} tokens")
        fill_table(
            model,
            Corpus(held_out, tokenizer),
            adapter=config.output,
            text=describe_data(config.data),
            settings=config.calibration,
            batch=config.batch,
            say=say,
        )
    if config.evaluation is not None:
        say("Evaluating on held-out text")
        _evaluate(model, tokenizer, held_out, config, reference=load_reference(config), say=say)
    adapter = read_adapter(output)[0]
    results = json.loads((output / EVAL_FILE).read_text()) if (output / EVAL_FILE).exists() else None
    (output / CARD_FILE).write_text(model_card(adapter, config, results), encoding="utf-8")
    shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    say(f"Done: {output}")
    return output


def prepare_output(config: RetrofitConfig) -> Path:
    """The output folder, made and found fit to start or resume in. Raises ValueError where it is not."""
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; name a folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the output folder {output}: {error.strerror}; name another") from None
    if not os.access(output, os.W_OK):
        raise ValueError(f"the output folder {output} is not writable; name another")
    if (output / CARD_FILE).exists() and (output / CONFIG_FILE).exists():
        raise ValueError(f"{output} holds a finished adapter; name another output folder or remove it first")
    if (output / CONFIG_COPY).exists():
        ours, theirs = config.training_keys(), load_config(output / CONFIG_COPY).training_keys()
        changed = [f"{key} {theirs[key]} there, {ours[key]} here" for key in ours if ours[key] != theirs[key]]
        if changed:
            raise ValueError(f"{output} holds another run ({'; '.join(changed)}); name another output folder")
    elif (output / CONFIG_FILE).exists():
        raise ValueError(f"{output} holds an adapter that this run did not make; name another output folder")
    return output


def check_processes(config: RetrofitConfig, processes: int) -> None:
    """Raises ValueError where the processes cannot share the model as tensor_parallel asks."""
    sharded = parse_flag_from_env("ACCELERATE_USE_FSDP")
    if sharded and config.policy == "dmc":
        raise ValueError("policy: dmc clears rows of weights that each process must hold whole: launch without FSDP")
    if config.tensor_parallel == 1:
        return
    if config.tensor_parallel != processes:
        raise ValueError(
            f"tensor_parallel is {config.tensor_parallel} and the processes are {processes}: all of them share the "
            "model, so start as many with `accelerate launch --num_processes`"
        )
    if sharded:
        raise ValueError("tensor_parallel shares the model between all processes: launch them without FSDP's settings")
    for name in {config.model, config.teacher or config.model}:
        check_shared(name, processes)


def load_for_training(config: RetrofitConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model, attached, and its tokenizer: bfloat16 on a GPU where the base is frozen, else float32. Raises
    ValueError as load_model does."""
    dtype = torch.float32 if config.trainable == "all" else dtype_of(config)
    model, tokenizer = load_model(
        config.model, device=device_of(config), dtype=dtype, tensor_parallel=config.tensor_parallel
    )
    attach(model, policy=config.policy, **adapter_config(model, config).policy_options())
    return model, tokenizer


def load_teacher(config: RetrofitConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
    """The second, frozen model to learn from, None where the student's own frozen base is the teacher.

    Raises ValueError for a teacher with another vocabulary.
    """
    if config.teacher is None and config.trainable != "all":
        return None
    name = config.model if config.teacher is None else config.teacher
    teacher, theirs = load_model(name, device=device_of(config), tensor_parallel=config.tensor_parallel)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"the teacher {name} has another vocabulary ({len(theirs)} tokens) than {config.model} ({len(tokenizer)}): "
            "a token must mean the same to both; name a teacher of the same family"
        )
    attach(teacher, policy="dense")  # keeps packed documents apart by their places, without a mask
    return teacher


def load_result(config: RetrofitConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What the run has made, as its user will load it: the base or the trained model, with the adapter attached."""
    name = str(Path(config.output) / MODEL_FOLDER) if config.trainable == "all" else config.model
    model, tokenizer = load_model(name, device=device_of(config), dtype=dtype_of(config))
    attach(model, adapter=config.output)
    return model, tokenizer


def load_reference(config: RetrofitConfig) -> PreTrainedModel | None:
    """What an evaluation compares with where all weights were trained: the base model. Else None."""
    if config.trainable != "all":
        return None
    return load_model(config.model, device=device_of(config), dtype=dtype_of(config))[0]


def device_of(config: RetrofitConfig) -> str | None:
    """As load_model takes it."""
    return None if config.device == "auto" else config.device


def dtype_of(config: RetrofitConfig) -> torch.dtype:
    """Of weights that are not trained: bfloat16 on a GPU, else float32."""
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    return torch.bfloat16 if on_gpu else torch.float32


def _train(documents: list[Documents], config: RetrofitConfig, *, say: Say) -> None:
    model, tokenizer = load_for_training(config)
    teacher = load_teacher(config, tokenizer)
    origin = provenance(model, config)
    say(f"Training {config.steps} steps to ratio {config.final_cr:g} on {origin['hardware']}")
    count = config.steps * config.batch
    rows = blend(documents, tokenizer, count=count, length=config.length, seed=config.seed, pieces=config.pieces)
    if PartialState().is_main_process:  # not before: a mistake in model or data leaves a folder that is free
        save_config(config, Path(config.output) / CONFIG_COPY)
    weights = train(model, rows, config, teacher=teacher, progress=PartialState().is_main_process)
    if not PartialState().is_main_process:
        return
    lines = read_lines(Path(config.output) / METRICS_FILE)
    made = adapter_config(
        model,
        config,
        steps=config.steps,
        final_cr=config.final_cr,
        minutes=round(total_seconds(lines) / 60, 2),
        marked=round(lines[-1]["fraction"], 4),
        **origin,
    )
    with told(Path(config.output)):
        export(weights, config.model, folder=Path(config.output), adapter=made)


def _evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: list[str],
    config: RetrofitConfig,
    *,
    reference: PreTrainedModel | None,
    say: Say,
) -> None:
    settings = config.evaluation
    assert settings is not None
    adapter = read_adapter(config.output)[0]
    reached = [ratio for ratio in settings.ratios if ratio == 1 or serves(ratio, most=adapter.max_cr)]
    points = [Point(asked=ratio, offset=adapter.offset_for(ratio)) for ratio in reached]
    scores: list[dict[str, Any]] = []
    about = {
        "model": config.model,
        "data": describe_data(config.data),
        "trained_texts": texts_of(config.data),
        "eviction": settings.eviction,
        "date": time.strftime("%Y-%m-%d"),
        **provenance(model, config),
        "seed": settings.seed,
        "settings": asdict(settings),
    }

    def keep(score: Score) -> None:
        scores.append(score.to_dict())
        (Path(config.output) / EVAL_FILE).write_text(json.dumps(about | {"scores": scores}, indent=1) + "\n")
        say("  " + describe(score))

    others = other_documents(settings.other_texts, trained_on=texts_of(config.data))
    evaluate(
        model,
        tokenizer,
        documents=held_out,
        points=points,
        settings=settings,
        others=others,
        reference=reference,
        on_score=keep,
    )


def provenance(model: PreTrainedModel, config: RetrofitConfig) -> dict[str, Any]:
    """Where numbers come from: hardware, torch, and this repository's commit."""
    found = environment(model.device)
    return {"hardware": found["hardware"], "torch": found["torch"], "commit": config.commit or found["commit"]}
