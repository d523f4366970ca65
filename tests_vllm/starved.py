"""An engine whose account of pages is wrong, in a process of its own: on a GPU its device is unusable afterwards.

    python starved.py MODEL ADAPTER, in the environment of conftest

There are fewer pages than the scheduler believes. No answer is the right answer: it must end with a sentence.
"""

import sys
from types import SimpleNamespace

from engines import engine, greedy, rows, texts


def main(model: str, adapter: str) -> None:
    made = SimpleNamespace(model=model, adapter=adapter)
    with engine(made, num_gpu_blocks_override=10, max_num_batched_tokens=48) as llm:
        texts(llm, [[5] * 40], greedy())
        rows(llm).cache.pool.free_count.fill_(4)
        print("answers", texts(llm, [[5] * 150, [6] * 120], greedy()))


if __name__ == "__main__":
    main(*sys.argv[1:])
