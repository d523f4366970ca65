"""Quest: nothing is freed; each query reads the pages whose keys may matter most to it (arXiv 2406.10774).

k = max(3, ceil(budget / page)) pages: the one just written to, and the k - 1 others with the highest bound on q . k
(ops.bounds). The first two layers and prompts are read densely. DMS + Quest reads so what DMS holds: a page's bounds
are those of what lies in it now.
"""

from typing import Any

from torch import Tensor

from sparsekv.cache.state import HeadShape, State
from sparsekv.ops.bounds import refresh, refresh_written, select
from sparsekv.ops.layout import LayerPages
from sparsekv.policies.base import Policy, Step
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


class PageSelection(Policy):
    """What both have: bounds by page, and `count` pages to read."""

    masks = False
    selects = True
    pads_chunks = False
    count: int

    def state(self, shape: HeadShape) -> list[State]:
        return [State(name="bounds", kind="page", shape=(2, shape.dim), dtype=shape.dtype)]

    def placed(self, step: Step, pages: LayerPages, slots: Tensor | None) -> None:
        """Bounds of the pages that the step wrote to, by the ring rule."""
        rows, bounds = step.batch.rows, step.state.page["bounds"]
        if step.layer < DENSE_LAYERS:
            return
        if step.decoding:
            refresh_written(pages, rows, None, bounds)
        else:
            refresh(pages, rows, bounds, longest=step.most)

    def read(self, step: Step, pages: LayerPages, slots: Tensor | None) -> LayerPages | None:
        if step.layer < DENSE_LAYERS:
            return None
        options = {"count": self.count, "written": None, "longest": step.most, "reads": step.reads}
        return select(pages, step.batch.rows, step.query, step.state.page["bounds"], **options)


class QuestPolicy(PageSelection):
    """Holds all, and reads the pages of about `budget` tokens that may matter most to the query.

    page_size: tokens of a page.
    """

    name = "quest"
    frees = False

    def __init__(self, *, budget: int, page_size: int = LEAST_PAGE) -> None:
        self.budget, self.page_size = budget, page_size
        self.count = pages_of(self.name, budget, page_size)


class DMSQuestPolicy(PageSelection, DMSPolicy):
    """Holds what DMS holds, and reads of it as Quest does.

    budget, page_size: Quest's; the rest: DMSPolicy's.
    """

    name = "dms-quest"

    def __init__(self, *args: Any, budget: int, page_size: int = LEAST_PAGE, **options: Any) -> None:
        super().__init__(*args, **options)
        self.page_size = page_size
        self.budget = budget

    @property
    def budget(self) -> int:
        """Tokens that a query reads about; assigning it takes effect from the next forward on."""
        return self._budget

    @budget.setter
    def budget(self, budget: int) -> None:
        assert self.page_size is not None
        self.count = pages_of(self.name, budget, self.page_size)
        self._budget = budget


def pages_of(name: str, budget: int, page_size: int) -> int:
    """k. Raises ValueError for a budget or a page that does not count tokens."""
    check_budget(name, budget, least=1)
    if page_size < 1 or page_size & (page_size - 1):
        raise ValueError(f"page_size is {page_size}; policy {name!r} needs a power of two, such as {LEAST_PAGE}")
    return max(LEAST_PAGES, -(-budget // page_size))
