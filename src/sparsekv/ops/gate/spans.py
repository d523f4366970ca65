"""Where documents lie, so that kernels exclude tiles and leave out masks by place."""

import torch
from torch import Tensor


def spans_of(documents: Tensor) -> Tensor:
    """int [B, S], equal where two tokens may see each other -> int32 [5, B, S], by token:

    0 ids; 1 no token before this one is of the same document; 2 from here to the token all are; 3 no token after this
    one is; 4 from the token to here all are. In a row whose ids neither only rise nor only fall a document may lie in
    pieces, so there 1 and 3 are the row's ends.
    """
    ids = documents.int()
    length = ids.shape[1]
    index = torch.arange(length, device=ids.device, dtype=torch.int32).expand_as(ids)
    step = ids.diff(dim=1)
    changes = step != 0
    starts = torch.nn.functional.pad(changes, (1, 0), value=True)
    ends = torch.nn.functional.pad(changes, (0, 1), value=True)
    run = torch.where(starts, index, 0).cummax(1).values
    until = torch.where(ends, index, length).flip(1).cummin(1).values.flip(1)
    whole = (step >= 0).all(1, keepdim=True) | (step <= 0).all(1, keepdim=True)
    return torch.stack([ids, torch.where(whole, run, 0), run, torch.where(whole, until, length - 1), until])
