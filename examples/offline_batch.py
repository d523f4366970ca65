"""Offline batch inference: many prompts of unequal length through one engine, and what each held of its cache.

python examples/offline_batch.py
python examples/offline_batch.py --adapter adapters/smollm2-135m --cr 4
"""

import argparse
import time

from sparsekv import LLM, SamplingParams

TOPICS = ["the sea", "a clock that runs backwards", "bread", "the night train to the north", "a very small elephant"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="embedded model, folder or hub id")
    parser.add_argument("--adapter", help="trained eviction heads; dense without")
    parser.add_argument("--cr", type=float, help="compression ratio to serve the adapter at")
    parser.add_argument("--kv-memory", default="256MiB", help="size of the page pool")
    parser.add_argument("--max-tokens", type=int, default=48)
    options = parser.parse_args()

    llm = LLM(options.model, adapter=options.adapter, cr=options.cr, kv_memory=options.kv_memory, max_model_len=2048)
    chats = [[{"role": "user", "content": f"Write two sentences about {topic}."}] for topic in TOPICS]
    start = time.perf_counter()
    outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=options.max_tokens))
    seconds = time.perf_counter() - start

    for topic, output in zip(TOPICS, outputs, strict=True):
        sample, kv = output.outputs[0], output.kv
        print(f"\n{topic} [{sample.finish_reason}]\n  {sample.text.strip()}")
        print(f"  {kv.tokens_seen} tokens seen, {kv.tokens_held:.0f} held: ratio {kv.compression_ratio:.2f}")
    tokens = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    print(f"\n{tokens} tokens in {seconds:.1f} s: {tokens / seconds:.1f} a second")


if __name__ == "__main__":
    main()
