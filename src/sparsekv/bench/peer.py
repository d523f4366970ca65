"""vLLM on the requests of `sparsekv bench serve`, dense, for figures of the same machine side by side:
python -m sparsekv.bench.peer OUT.jsonl [COMMIT [WORK ...]]

The same numbers of the same lengths, random weights, and a pool for keys and values of the same size. Works in a row
that agree in shape and pool share an engine. Two things are its own: no text, and sampling without a seed of each
request, which vLLM supports but serves more slowly.

vLLM is not a dependency: run this where it is installed, with VLLM_WORKER_MULTIPROC_METHOD=spawn, since its engine
cannot be forked off a process that has asked for the GPU.
"""

import importlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from sparsekv.bench.serve import SAMPLING, SPARE_TOKENS, WORKS, Work, output_lengths, random_prompts
from sparsekv.bench.shapes import shape_of
from sparsekv.provenance import environment

BUCKETS = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256]
"""Batch sizes of which vLLM records a CUDA graph."""


def main(arguments: list[str]) -> int:
    """Exit code 2 without a file to write to. Raises ValueError for an unknown work."""
    if not arguments:
        print("usage: python -m sparsekv.bench.peer OUT.jsonl [COMMIT [WORK ...]]", file=sys.stderr)
        return 2
    path, commit, names = Path(arguments[0]), arguments[1:2], arguments[2:]
    path.parent.mkdir(parents=True, exist_ok=True)
    for result in bench_peer(peers_of(names), device=torch.device("cuda")):
        result |= {"commit": commit[0]} if commit else {}
        with path.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps(result), flush=True)
    return 0


def peers_of(names: Sequence[str]) -> list[Work]:
    """The works of these names, or all. Raises ValueError for an unknown one, and for one with arrivals: those are
    timed through our own streams."""
    known = {work.name: work for work in WORKS if work.arrivals is None}
    if wrong := [name for name in names if name not in known]:
        raise ValueError(f"no such work for vLLM: {', '.join(wrong)}; use some of {', '.join(known)}")
    return [known[name] for name in names or known]


def bench_peer(works: Sequence[Work], *, device: torch.device) -> Iterator[dict[str, Any]]:
    """A result for each start of vLLM, and for each work as soon as it is done, in the form of bench_serve's."""
    for _, group in groupby(works, key=lambda work: (work.shape, work.memory)):
        yield from _group(list(group), device)


def _group(works: list[Work], device: torch.device) -> Iterator[dict[str, Any]]:
    vllm = _vllm()
    work, rows = works[0], max(each.rows for each in works)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        longest = max(each.longest for each in works) + SPARE_TOKENS
        config = shape_of(work.shape).config(longest)
        config.dtype = torch.bfloat16
        config.save_pretrained(folder)
        _name_its_class(Path(folder) / "config.json", work.shape)
        llm = vllm.LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=longest,
            kv_cache_memory_bytes=work.memory,
            enable_prefix_caching=False,
            max_num_seqs=rows,
            max_num_batched_tokens=8192,
            disable_log_stats=True,
            compilation_config={"cudagraph_capture_sizes": [size for size in BUCKETS if size <= rows]},
        )
    start = time.perf_counter() - begun
    shared = {"bench": "serve", "engine": f"vLLM {vllm.__version__}", "shape": work.shape, "memory": work.memory}
    shared |= {"ratio": 1, "rows": rows, **environment(device)}
    vocabulary = shape_of(work.shape).vocabulary
    yield {"work": "start", "start_s": start, **shared}
    for kind in dict.fromkeys(each.sampling for each in works):
        _generate(llm, random_prompts(rows, 64, vocabulary, seed=0), [_params(kind, 16)] * rows)
    for each in works:
        lengths = output_lengths(each, seed=0)
        params = [_params(each.sampling, length, n=each.samples) for length in lengths]
        prompts = random_prompts(each.requests, each.prompt, vocabulary, seed=0)
        begun = time.perf_counter()
        written = _generate(llm, prompts, params)
        seconds = time.perf_counter() - begun
        if written != each.samples * sum(lengths):
            raise RuntimeError(f"{each.name}: {written} tokens came of {each.samples * sum(lengths)}")
        sizes = {name: getattr(each, name) for name in ("requests", "samples", "prompt", "output", "sampling")}
        figures = {"seconds": seconds, "tokens_per_s": written / seconds}
        yield {"work": each.name, **sizes, **figures, **shared}


def _vllm() -> Any:
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise ValueError("vLLM is not installed here: run this in an environment that has it") from error


def _name_its_class(config: Path, shape: str) -> None:
    """vLLM asks for the model's class by name, which a configuration alone does not say."""
    names = {"Qwen3Config": "Qwen3ForCausalLM", "LlamaConfig": "LlamaForCausalLM"}
    said = json.loads(config.read_text()) | {"architectures": [names[shape_of(shape).family.__name__]]}
    config.write_text(json.dumps(said))


def _params(sampling: str, tokens: int, n: int = 1) -> Any:
    options = {key: value for key, value in SAMPLING[sampling].items() if key != "seed"}
    return _vllm().SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, n=n, **options)


def _generate(llm: Any, prompts: list[list[int]], params: list[Any]) -> int:
    """Tokens written."""
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return sum(len(completion.token_ids) for output in outputs for completion in output.outputs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
