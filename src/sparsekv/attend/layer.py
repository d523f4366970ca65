"""One layer of a forward over pages: the policy is asked, the operations run."""

from torch import Tensor

from sparsekv.cache.prune import prune
from sparsekv.cache.ragged import RaggedCache
from sparsekv.ops.decode import decode
from sparsekv.ops.layout import LayerPages
from sparsekv.ops.place import align_marks, place
from sparsekv.ops.prefill import prefill
from sparsekv.policies.base import Policy, Prompt, Step


def prefill_layer(policy: Policy, step: Step, pages: LayerPages) -> Tensor:
    """Attend and place many tokens per sequence: [T, H * G, D]. The caller ends the prompt.

    Raises PoolExhausted where the pool has too few pages; nothing of this layer is placed then.
    """
    key, value = policy.store(step, pages)
    marks = _aligned(policy, step, pages, policy.marks(step))
    options = {"scale": step.scale, "marks": marks}
    lse = None
    if policy.weighs:
        out, lse = prefill(pages, step.batch, step.query, key, value, return_lse=True, **options)
    else:
        out = prefill(pages, step.batch, step.query, key, value, **options)
    place(pages, step.batch, key, value, marks=marks)
    policy.placed(step, pages, None)
    policy.observe(step, pages, lse)
    return out


def decode_layer(policy: Policy, step: Step, pages: LayerPages) -> Tensor:
    """Place and attend one token per sequence: [T, H * G, D].

    Raises PoolExhausted where the pool has too few pages.
    """
    key, value = policy.store(step, pages)
    marks = policy.decode_marks(step)
    if isinstance(marks, Tensor):
        marks = _aligned(policy, step, pages, marks)
    slots = policy.slots(step, pages)
    place(pages, step.batch, key, value, marks=marks, slots=slots)
    policy.placed(step, pages, slots)
    view, rows = policy.read(step, pages, slots), step.batch.starts[:-1]  # in a decode step 0 .. B - 1
    if view is None:
        view, rows = pages, step.batch.rows
        if step.reads is not None:
            step.reads[0, rows] += pages.lengths[rows]  # -1 counts in the spare place
    result = decode(view, rows, step.query, scale=step.scale, return_lse=policy.weighs)
    policy.observe(step, pages, result.lse)
    return result.out


def finish_prompts(policy: Policy, prompt: Prompt, cache: RaggedCache) -> None:
    """The prompts of some rows are over: carry out what the policy prunes."""
    keep = policy.finish_prompt(prompt, cache.layer(prompt.layer))
    if keep is not None:
        prune(cache, prompt.layer, prompt.rows, keep)


def _aligned(policy: Policy, step: Step, pages: LayerPages, marks: Tensor | None) -> Tensor | None:
    if marks is None or policy.lag == 0:
        return marks
    return align_marks(pages, step.batch, marks, policy.lag)
