"""Quest: nothing is freed; each query reads the pages whose keys may matter most to it (arXiv 2406.10774).

k = max(3, ceil(budget / page)) pages: the one just written to, and the k - 1 others with the highest bound on q . k
(ops.bounds). The first two layers and prompts are read densely. DMS + Quest reads so what DMS holds: a page's bounds
are those of what lies in it now.
"""

from typing import Any

from torch import Tensor

from sparsekv.cache.state import HeadShape, State
from sparsekv.ops.bounds import refresh, refresh_written, select
from sparsekv.ops.layout import LayerPages, written
from sparsekv.policies.base import Policy, Reading, Step
from sparsekv.policies.budget import check_budget
from sparsekv.policies.dms import DMSPolicy

DENSE_LAYERS = 2
LEAST_PAGES = 3
LEAST_PAGE = 16


def quest_page(cr: float | None) -> int:
    """Tokens of a page: 16, or twice the ratio where that is more; a power of two, as kernels want."""
    page = LEAST_PAGE
    while cr is not None and page < 2 * cr:
        page *= 2
    return page


class QuestPolicy(Policy):
    """Holds all, and reads the pages of about `budget` tokens that may matter most to the query.

    page_size: tokens of a page.
    """

    name = "quest"
    masks = False
    frees = False
    selects = True

    def __init__(self, *, budget: int, page_size: int = LEAST_PAGE) -> None:
        self.budget, self.page_size = budget, page_size
        self.count = pages_of(self.name, budget, page_size)

    def state(self, shape: HeadShape) -> list[State]:
        return [bounds_state(shape)]

    def placed(self, step: Step, pages: LayerPages, slots: Tensor | None) -> None:
        keep_bounds(step, pages, slots)

    def read(self, step: Step, pages: LayerPages, slots: Tensor | None) -> Reading | None:
        return best_pages(step, pages, slots, count=self.count)


class DMSQuestPolicy(DMSPolicy):
    """Holds what DMS holds, and reads of it as Quest does.

    budget, page_size: Quest's; the rest: DMSPolicy's.
    """

    name = "dms-quest"
    masks = False
    selects = True

    def __init__(self, *args: Any, budget: int, page_size: int = LEAST_PAGE, **options: Any) -> None:
        super().__init__(*args, **options)
        self.budget, self.page_size = budget, page_size
        self.count = pages_of(self.name, budget, page_size)

    def state(self, shape: HeadShape) -> list[State]:
        return [bounds_state(shape)]

    def placed(self, step: Step, pages: LayerPages, slots: Tensor | None) -> None:
        keep_bounds(step, pages, slots)

    def read(self, step: Step, pages: LayerPages, slots: Tensor | None) -> Reading | None:
        return best_pages(step, pages, slots, count=self.count)


def pages_of(name: str, budget: int, page_size: int) -> int:
    """k. Raises ValueError for a budget or a page that does not count tokens."""
    check_budget(name, budget, least=1)
    if page_size < 1 or page_size & (page_size - 1):
        raise ValueError(f"page_size is {page_size}; policy {name!r} needs a power of two, such as {LEAST_PAGE}")
    return max(LEAST_PAGES, -(-budget // page_size))


def bounds_state(shape: HeadShape) -> State:
    return State(name="bounds", kind="page", shape=(2, shape.dim), dtype=shape.dtype)


def keep_bounds(step: Step, pages: LayerPages, slots: Tensor | None) -> None:
    """Bounds of the pages that the step wrote to."""
    rows, bounds = step.batch.rows, step.state.page["bounds"]
    if step.layer < DENSE_LAYERS:
        return
    if step.decoding:
        refresh_written(pages, rows, written(pages, rows, slots).int(), bounds)
    else:
        refresh(pages, rows, bounds, longest=step.most)


def best_pages(step: Step, pages: LayerPages, slots: Tensor | None, *, count: int) -> Reading | None:
    if step.layer < DENSE_LAYERS:
        return None
    rows, bounds = step.batch.rows, step.state.page["bounds"]
    newest = written(pages, rows, slots).int()
    view = select(pages, rows, step.query, bounds, count=count, written=newest, longest=step.most)
    held = -(-pages.lengths[rows] // pages.page_size)
    return Reading(pages=view, bounds=held * (rows >= 0)[:, None])
