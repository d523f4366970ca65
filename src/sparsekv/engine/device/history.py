"""Which tokens each row's sequence has seen, on the device, for the repetition, presence and frequency penalties.

Allocated when the first request with a penalty comes: 5 bytes per row and vocabulary entry.
"""

import torch
from torch import Tensor


class TokenHistory:
    """prompt: bool [R, vocab]; counts: int32 [R, vocab], occurrences in the output."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._rows, self._device = rows, device
        self._prompt = self._counts = torch.empty(0)

    def load(self, row: int, prompt: list[int], output: list[int], *, vocab: int) -> None:
        """Start anew for the sequence that now owns `row`."""
        if not self._prompt.numel():
            self._prompt = torch.zeros(self._rows, vocab, dtype=torch.bool, device=self._device)
            self._counts = torch.zeros(self._rows, vocab, dtype=torch.int32, device=self._device)
        self._prompt[row] = False
        self._prompt[row, torch.tensor(prompt, device=self._device)] = True
        self._counts[row] = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=vocab).to(self._device)

    def add(self, rows: Tensor, tokens: Tensor) -> None:
        """Count tokens int64 [n], one for each of rows int64 [n]."""
        if self._prompt.numel():
            one = torch.ones((), dtype=torch.int32, device=self._device)
            self._counts.index_put_((rows, tokens), one, accumulate=True)

    def penalise(self, logits: Tensor, rows: Tensor, penalties: Tensor) -> Tensor:
        """logits: [S, vocab]; rows: int64 [S]; penalties: [3, S]: repetition, presence, frequency."""
        repetition, presence, frequency = (x[:, None].to(logits.dtype) for x in penalties)
        counts = self._counts[rows]
        seen = self._prompt[rows] | (counts > 0)
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(seen, repeated, logits)
        return logits - presence * (counts > 0) - frequency * counts
