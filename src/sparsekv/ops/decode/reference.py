"""decode in plain PyTorch: an exact softmax over the live slots of each head.

A row's pages are copied together and multiplied page by page, so that a layer takes few calls and PyTorch's threads
share all of its heads.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sparsekv.ops.layout import LayerPages


def page_table(layer: LayerPages, row: int, lengths: list[int]) -> tuple[Tensor, list[int]]:
    """The pages of a row's heads, one head after the other, int32 [N], and how many each head has.

    lengths: the slots that each head has in use."""
    counts = [-(-length // layer.page_size) for length in lengths]
    return torch.cat([layer.pages[row, head, :count] for head, count in enumerate(counts)]), counts


def gather_slots(layer: LayerPages, row: int, lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each head of a row in slot order: two [length, D] a head."""
    table, counts = page_table(layer, row, lengths)
    keys, values = (layer.kv[:, i].index_select(0, table).split(counts) for i in (0, 1))
    return [
        (k.flatten(0, 1)[:length], v.flatten(0, 1)[:length]) for k, v, length in zip(keys, values, lengths, strict=True)
    ]


def decode(
    layer: LayerPages,
    rows: Tensor,
    q: Tensor,
    scale: float,
    *,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """See api.decode. A head that holds nothing sums over nothing: its output is 0 and its log-sum-exp -inf."""
    heads, size = layer.lengths.shape[1], layer.page_size
    work = torch.promote_types(q.dtype, torch.float32)
    grouped = (q.to(work) * scale).unflatten(1, (heads, 1, -1))
    lengths = layer.lengths.tolist()
    held = [lengths[row] if row >= 0 else [0] * heads for row in rows.tolist()]
    out, lse = [], []
    for b, row in enumerate(rows.tolist()):
        table, counts = page_table(layer, row, held[b])
        query = torch.cat([x.expand(count, -1, -1) for x, count in zip(grouped[b], counts, strict=True)])
        keys, values = layer.kv.index_select(0, table).to(work).unbind(1)  # [N, C, D] each
        for part, length in zip(values.split(counts), held[b], strict=True):
            if length % size:
                part[-1, length % size :] = 0  # not in use: anything may lie there
        scores = pad_sequence(list(torch.bmm(query, keys.mT).split(counts)), batch_first=True)  # [H, pages, G, C]
        scores = scores.transpose(1, 2).flatten(2)
        for h, length in enumerate(held[b]):
            scores[h, :, length:] = -torch.inf
        weight = scores.softmax(-1)
        by_page = weight.unflatten(2, (max(counts), size)).transpose(1, 2)
        by_page = torch.cat([x[:count] for x, count in zip(by_page, counts, strict=True)])
        out += [x.sum(0) for x in torch.bmm(by_page, values).split(counts)]
        if with_lse:
            lse.append(scores.logsumexp(-1))
    return torch.cat(out).view(q.shape).to(q.dtype), torch.cat(lse).view(q.shape[:2]) if with_lse else None
