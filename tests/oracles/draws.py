"""Random sequences, and feeding them to an oracle."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from oracles.dense import Dense

Turns = list[tuple[int, int]]
"""(prompt tokens, decoded tokens) of each turn of one sequence."""


def turns(
    *, most_turns: int = 3, prompt: tuple[int, int] = (1, 12), decoded: tuple[int, int] = (0, 12)
) -> st.SearchStrategy[Turns]:
    """Random turns; prompt and decoded are the least and the greatest number of tokens."""
    return st.lists(st.tuples(st.integers(*prompt), st.integers(*decoded)), min_size=1, max_size=most_turns)


def token_count(turns: Turns) -> int:
    return sum(prompt + decoded for prompt, decoded in turns)


def random_inputs(seed: int, count: int, *, heads: int = 2, group: int = 2, dim: int = 4) -> tuple[Tensor, ...]:
    """query [count, heads * group, dim], key and value [count, heads, dim]: float64, weights far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(count, heads * group, dim), (count, heads, dim), (count, heads, dim)]
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return 2 * query, key, value


def play(oracle: Dense, turns: Turns, query: Tensor, key: Tensor, value: Tensor, **inputs: Tensor) -> Tensor:
    """The outputs [tokens, H * G, D]; inputs [tokens, H], by the method. What was held and read is in the oracle."""
    out, start = [], 0
    for prompt, decoded in turns:
        part = slice(start, start + prompt)
        named = {name: x[part] for name, x in inputs.items()}
        out.append(oracle.prompt(query[part], key[part], value[part], **named))
        start += prompt
        for t in range(start, start + decoded):
            named = {name: x[t] for name, x in inputs.items()}
            out.append(oracle.decode(query[t], key[t], value[t], **named)[None])
        start += decoded
    assert start == len(query)
    return torch.cat(out)
