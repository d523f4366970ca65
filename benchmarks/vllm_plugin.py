"""vLLM dense (BF16 or FP8 keys and values) beside vLLM with sparsekv's plugin: steps, throughput, churn, capacity.

    python benchmarks/vllm_plugin.py {dense,fp8,plugin} [--points 8x32768,32x8192,1x8192] [--serve 57x1024x4096]
        [--churn 512] [--longest] [--kv GIB] [--ratio 8] [--tp N] [--pp N] [--shape qwen3-8b] >> results.jsonl
    python -m sparsekv.bench.reports.vllm results.jsonl docs/vllm.md

One engine a process, random weights, one JSON line a measurement. The plugin runs random heads, dialled to the ratio at
each length: what is held is measured on the workers and printed. A decode step is timed where all requests decode.
Needs vLLM and sparsekv installed: vLLM's processes find the plugin by its entry point.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # collective_rpc is given functions of this file
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from sparsekv.modeling.adapter import PREFIX, AdapterConfig, base_shape, write_adapter
from sparsekv.provenance import commit

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        "num_hidden_layers": 36,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "num_hidden_layers": 3,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 2048,
        "tie_word_embeddings": False,
    },
}
WINDOW = 64
AT_ONCE = 64
"""Requests in flight where they come and go."""
WARM = 16
"""Decode steps of all requests before a step is timed."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["dense", "fp8", "plugin"])
    parser.add_argument("--points", default="", help="BxCONTEXT of decode steps, comma separated")
    parser.add_argument("--serve", default="", help="REQUESTSxINxOUT, comma separated")
    parser.add_argument("--churn", type=int, default=0, help="prompts of 256 tokens, outputs of 64 to 448, 64 at once")
    parser.add_argument("--longest", action="store_true", help="one sequence as long as the cache holds, at 0.8 ratio")
    parser.add_argument("--kv", type=float, default=40, help="GiB for keys and values on each GPU")
    parser.add_argument("--ratio", type=float, default=8)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-8b")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--steps", type=int, default=256, help="decode steps of a point")
    parser.add_argument("--tokens", type=int, default=0, help="max_num_batched_tokens; 8192, plugin 2048, longest 1024")
    parser.add_argument("--sequences", type=int, default=256, help="at once, at most")
    parser.add_argument("--commit", help="this repository's, where there is no git to ask")
    parser.add_argument("--eager", action="store_true")
    return parser.parse_args()


def model_folder(folder: Path, shape: dict[str, Any]) -> Any:
    """A configuration without weights, which vLLM draws."""
    from transformers import Qwen3Config

    config = Qwen3Config(architectures=["Qwen3ForCausalLM"], max_position_embeddings=1 << 20, dtype="bfloat16", **shape)
    config.save_pretrained(folder)
    return config


def random_adapter(folder: Path, config: Any) -> None:
    """Heads whose logits differ between tokens whatever the weights' size; the offset is dialled in the engine."""
    generator = torch.Generator().manual_seed(0)
    heads, hidden = config.num_key_value_heads, config.hidden_size
    state = {}
    for layer in range(config.num_hidden_layers):
        name = f"{PREFIX}model.layers.{layer}.self_attn.eviction_head"
        state[f"{name}.weight"] = torch.randn(heads, hidden, generator=generator)
        state[f"{name}.bias"] = torch.zeros(heads)
    write_adapter(
        folder, AdapterConfig(base_model_name_or_path="random", base_shape=base_shape(config), window=WINDOW), state
    )


def start(options: argparse.Namespace, longest: int) -> Any:
    """vLLM's engine. longest: tokens of a sequence."""
    from vllm import LLM

    folder = Path(tempfile.mkdtemp())
    config = model_folder(folder / "model", SHAPES[options.shape])
    on_gpu = torch.cuda.is_available()
    arguments: dict[str, Any] = {
        "model": str(folder / "model"),
        "load_format": "dummy",
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 8192,
    }
    if options.mode == "plugin":
        from sparsekv.integrations.vllm import engine_args

        random_adapter(folder / "adapter", config)
        trusted = 0.95 * options.ratio if options.longest else 1.0
        arguments = engine_args(str(folder / "model"), adapter=str(folder / "adapter"), trusted_ratio=trusted)
        arguments["model_loader_extra_config"] = {"load_format": "dummy"}
    elif options.mode == "fp8":
        arguments["kv_cache_dtype"] = "fp8"
    if options.tokens or options.longest:  # steps in flight need room that the one sequence should have
        arguments["max_num_batched_tokens"] = options.tokens or 1024
    if on_gpu:
        arguments["kv_cache_memory_bytes"] = int(options.kv * 2**30)
        arguments["gpu_memory_utilization"] = 0.5  # must be free at the start; decides nothing else beside the bytes
    return LLM(
        **arguments,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=longest,
        max_num_seqs=options.sequences if on_gpu else 16,
        tensor_parallel_size=options.tp,
        pipeline_parallel_size=options.pp,
        enforce_eager=options.eager,
        seed=0,
    )


class Bench:
    """One engine and what is measured on it."""

    def __init__(self, options: argparse.Namespace, llm: Any) -> None:
        import vllm

        self.options, self.llm = options, llm
        self.vocabulary = SHAPES[options.shape]["vocab_size"]
        self.rng = random.Random(0)
        config = llm.llm_engine.vllm_config
        self.base = {
            "mode": options.mode,
            "shape": options.shape,
            "tp": options.tp,
            "pp": options.pp,
            "kv_gib": options.kv,
            "blocks": config.cache_config.num_gpu_blocks,
            "graphs": str(config.compilation_config.cudagraph_mode),
            "v2_runner": bool(getattr(config, "use_v2_model_runner", False)),
            "async": bool(config.scheduler_config.async_scheduling),
            "batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "vllm": vllm.__version__,
            "commit": options.commit or commit(),
        }

    def prompts(self, count: int, tokens: int) -> list[dict[str, list[int]]]:
        return [
            {"prompt_token_ids": [self.rng.randrange(self.vocabulary - 1) for _ in range(tokens)]} for _ in range(count)
        ]

    def run(self, prompts: list[Any], outputs: list[int]) -> float:
        """Seconds."""
        params = [sampling(n) for n in outputs]
        begin = time.perf_counter()
        done = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        assert [len(output.outputs[0].token_ids) for output in done] == outputs
        return seconds

    def say(self, **found: Any) -> None:
        print(json.dumps(self.base | found), flush=True)

    def dial(self, tokens: int) -> float | None:
        """Set the heads so that a sequence of `tokens` tokens is held at the ratio; returns what one of 4,096 is."""
        if self.options.mode != "plugin":
            return None
        probe = min(4096, tokens - 1)
        share = (tokens / self.options.ratio - WINDOW) / (tokens - WINDOW)
        want = WINDOW + share * (probe - WINDOW)
        low, high, held = -8.0, 8.0, 0.0
        self.llm.collective_rpc(_watch_releases, args=(probe,))
        while abs(held - want) > 0.01 * want and high - low > 1e-6:
            offset = (low + high) / 2
            self.llm.collective_rpc(_set_offset, args=(offset,))
            self.run(self.prompts(1, probe), [1])
            held = self._held()
            if held > want:
                low = offset
            else:
                high = offset
        self.llm.collective_rpc(_watch_releases, args=(None,))
        return probe / held

    def _held(self) -> float:
        """Tokens per head of the one request that ran, once its row is released: soon after its answer."""
        while None in (found := self.llm.collective_rpc(_last_released)):
            time.sleep(0.002)
        return statistics.mean(found)

    def point(self, batch: int, context: int) -> None:
        ratio = self.dial(context)
        spread = -(-batch * context // self.base["batched_tokens"])  # steps between the first tokens of first and last
        params = sampling(WARM + self.options.steps + spread)
        for index, prompt in enumerate(self.prompts(batch, context)):
            self.llm.llm_engine.add_request(f"{batch} x {context}, {index}", prompt, params)
        begin, step, tokens = 0.0, 0.0, dict[str, int]()
        while self.llm.llm_engine.has_unfinished_requests():
            for output in self.llm.llm_engine.step():
                tokens[output.request_id] = len(output.outputs[0].token_ids)
            least = min(tokens.values()) if len(tokens) == batch else 0
            if least >= WARM and not begin:
                begin, first = time.perf_counter(), least
            if begin and not step and least >= first + self.options.steps - WARM:
                step = (time.perf_counter() - begin) / (least - first)
        assert step, "the first request ended before all had decoded long enough"
        self.say(what="step", batch=batch, context=context, ratio_of_probe=ratio, ms=round(step * 1e3, 3))

    def serve(self, count: int, prompt: int, output: int) -> None:
        ratio = self.dial(prompt + output)
        seconds = self.run(self.prompts(count, prompt), [output] * count)
        rate = round(count * output / seconds, 1)
        size = {"requests": count, "in": prompt, "out": output, "ratio_of_probe": ratio}
        self.say(what="serve", **size, seconds=round(seconds, 2), out_tokens_per_second=rate)

    def churn(self, count: int) -> None:
        ratio = self.dial(512)
        waiting = [(prompt, self.rng.randrange(64, 448)) for prompt in self.prompts(count, 256)]
        engine, running, begin = self.llm.llm_engine, 0, time.perf_counter()
        while waiting or running:
            while waiting and running < AT_ONCE:
                prompt, tokens = waiting.pop()
                engine.add_request(f"churn {len(waiting)}", prompt, sampling(tokens))
                running += 1
            running -= sum(output.finished for output in engine.step())
        seconds = time.perf_counter() - begin
        self.say(what="churn", requests=count, at_once=AT_ONCE, ratio_of_probe=ratio, seconds=round(seconds, 2))

    def longest(self, tokens: int) -> None:
        ratio = self.dial(tokens)
        seconds = self.run(self.prompts(1, tokens - 32), [16])
        dense = (self.base["blocks"] - 1) * self.llm.llm_engine.vllm_config.cache_config.block_size
        self.say(what="longest", tokens=tokens, dense_tokens=dense, ratio_of_probe=ratio, seconds=round(seconds, 2))


def _set_offset(worker: Any, offset: float) -> None:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    held = get_kv_transfer_group()._rows
    held.last_released = None
    for policy in held.executor.policies:
        policy.offset = offset


def _watch_releases(worker: Any, tokens: int | None) -> None:
    """In a worker: keep what a row that saw so many tokens holds when it is released; None: no longer."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    held = get_kv_transfer_group()._rows
    if tokens is None:
        del held.release
        return
    release = held.release

    def watched(rows: list[int]) -> None:
        if len(rows) == 1 and int(held.cache.seen[0, rows]) == tokens:
            held.last_released = float(held.cache.lengths[:, rows].float().mean())
        release(rows)

    held.release = watched


def _last_released(worker: Any) -> float | None:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()._rows.last_released


def sampling(tokens: int) -> Any:
    """Greedy, exactly so many tokens."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def sizes(text: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, part.split("x"))) for part in text.split(",") if part]


def main() -> int:
    options = parse()
    points, work = sizes(options.points), sizes(options.serve)
    room = options.steps + 600
    longest = max([context + room for _, context in points] + [i + o + 16 for _, i, o in work] + [4200])
    if options.longest:
        shape = SHAPES[options.shape]
        element = 1 if options.mode == "fp8" else 2  # bytes
        token = 2 * element * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
        dense = int(options.kv * 2**30 * options.tp * options.pp / token)
        longest = int(dense * (0.8 * options.ratio if options.mode == "plugin" else 0.999))
    begin = time.perf_counter()
    bench = Bench(options, start(options, longest))
    bench.say(what="start", seconds=round(time.perf_counter() - begin, 1))
    for batch, context in points:
        bench.point(batch, context)
    for count, prompt, output in work:
        bench.serve(count, prompt, output)
    if options.churn:
        bench.churn(options.churn)
    if options.longest:
        bench.longest(longest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
