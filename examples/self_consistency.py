"""Self-consistency: sixteen chains of thought from one prefill, and a majority vote over their answers.

The prompt is prefilled once; the samples fork from it and share its settled pages. The model here is tiny, so watch the
mechanics, not the score.

    python examples/self_consistency.py
    python examples/self_consistency.py --adapter adapters/smollm2-135m --cr 4
"""

import argparse
import re
from collections import Counter

from sparsekv import LLM, SamplingParams

QUESTION = "A box holds 3 red balls and 4 blue balls. How many balls does it hold? End with 'The answer is N.'"


def answer_of(text: str) -> str | None:
    """The last whole number of a chain."""
    numbers = re.findall(r"\d+", text)
    return numbers[-1] if numbers else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="embedded model, folder or hub id")
    parser.add_argument("--adapter", help="trained eviction heads; dense without")
    parser.add_argument("--cr", type=float, help="compression ratio to serve the adapter at")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("-n", type=int, default=16, help="chains")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    llm = LLM(options.model, adapter=options.adapter, cr=options.cr, kv_memory="256MiB", max_model_len=2048)
    params = SamplingParams(n=options.n, temperature=0.7, top_p=0.95, max_tokens=options.max_tokens, seed=options.seed)
    (output,) = llm.chat([{"role": "user", "content": options.question}], params)

    votes = Counter(answer for c in output.outputs if (answer := answer_of(c.text)) is not None)
    for c in output.outputs:
        print(f"{c.index:3}  {answer_of(c.text) or '-':>6}  {' '.join(c.text.split())[:90]}")
    print(f"\nvotes: {', '.join(f'{answer} x {count}' for answer, count in votes.most_common()) or 'none'}")
    kv = output.kv
    print(
        f"{kv.tokens_seen} tokens seen, {kv.tokens_held:.0f} held (ratio {kv.compression_ratio:.2f}), over all chains"
    )


if __name__ == "__main__":
    main()
