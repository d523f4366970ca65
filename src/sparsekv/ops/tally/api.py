"""tally: what each row holds, summed up over layers and KV heads, in one table on the device."""

from torch import Tensor

from sparsekv.ops.layout import check_backend
from sparsekv.ops.tally import reference

BACKENDS = ("reference", "triton")


def tally(lengths: Tensor, seen: Tensor, free_count: Tensor, *, page_size: int, backend: str | None = None) -> Tensor:
    """lengths: int32 [N, R, H]; seen: int32 [N, R]; free_count: int32 [1]. Returns int32 [R + 1, 2 + C].

    Of each row: the tokens that the first layer saw, the pages of all heads, and the number of heads by their length
    modulo the page size C. The last row holds the free pages, then zeros.

    Without a backend's name, Triton runs on CUDA, the reference elsewhere. Raises ValueError where the backend asked
    for is unknown or cannot run.
    """
    if check_backend(backend, lengths.device, BACKENDS) == "triton":
        from sparsekv.ops.tally import triton

        return triton.tally(lengths, seen, free_count, page_size)
    return reference.tally(lengths, seen, free_count, page_size)
