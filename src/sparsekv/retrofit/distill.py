"""The loss of a retrofit as one module, so that whatever wraps a model for many devices wraps all of it.

L = D(teacher, student with soft gates) + pull(target, fraction of marks)      (arXiv 2506.05345, section 3.2)

The teacher is the student's own base weights with eviction off where those are frozen (heads alone; heads with LoRA,
whose weights are then left out), else a second, frozen model. The text's length times the vocabulary never exists at
once: the divergence and its gradient go through the output head a few positions at a time.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sparsekv import dms
from sparsekv.modeling import modes
from sparsekv.modeling.attach import attachment_of
from sparsekv.modeling.modes import SoftGates
from sparsekv.modeling.states import Divergence, SplitModel
from sparsekv.retrofit.config import RetrofitConfig

_DIVERGENCES: dict[str, Divergence] = {
    "kl_teacher_student": dms.kl_teacher_student,
    "kl_student_teacher": dms.kl_student_teacher,
}


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What one forward is to do."""

    seed: int
    """Of the gates' noise."""
    target: float
    """The fraction of marks to reach."""
    part: int = 0
    parts: int = 1
    """The rows are piece `part` of the `parts` equal pieces of a step's batch."""


class Distillation(nn.Module):
    """student: attached with DMS and within modes.soft; teacher: None where the student's frozen base is one."""

    def __init__(
        self, student: PreTrainedModel, config: RetrofitConfig, *, teacher: PreTrainedModel | None = None
    ) -> None:
        super().__init__()
        self.student, self.teacher, self.settings = student, teacher, config
        with modes.original(student), torch.no_grad():
            self.split = SplitModel(student)
        self.teacher_split = None if teacher is None else SplitModel(teacher)
        self.divergence = _DIVERGENCES[config.divergence]

    def forward(self, input_ids: Tensor, draw: Draw, documents: Tensor | None = None) -> dict[str, Tensor]:
        """input_ids: int64 [B, S]; documents: as SplitModel.hidden takes them. Returns float32 "loss", "divergence",
        "pull" and "fractions" [layers], the marked fraction of each; the last two over the batch of all processes."""
        gates = attachment_of(self.student).gates
        assert isinstance(gates, SoftGates), "training runs within modes.soft"
        with self._autocast(input_ids.device):
            teacher = self._teach(input_ids, documents)
            gates.begin(seed=draw.seed, part=draw.part, parts=draw.parts)
            student = self.split.hidden(input_ids, documents=documents)
            divergence = self._diverge(teacher, student)
        fractions = over_processes(marked_fractions(gates.gates, hard=self.settings.fraction == "hard"))
        pull = dms.hinge(fractions.mean(), draw.target)
        return {
            "loss": divergence + pull,
            "divergence": divergence.detach(),
            "pull": pull.detach(),
            "fractions": fractions.detach(),
        }

    @torch.no_grad()
    def _teach(self, ids: Tensor, documents: Tensor | None) -> Tensor:
        if self.teacher_split is not None:
            return self.teacher_split.hidden(ids, documents=documents)
        with modes.original(self.student):
            return self.split.hidden(ids, documents=documents)

    def _diverge(self, teacher: Tensor, student: Tensor) -> Tensor:
        trained_head = any(p.requires_grad for p in self.split.head.parameters())
        if self.teacher_split is None and not trained_head:
            return self.split.divergence(teacher, student, self.divergence)
        other = self.teacher_split or self.split

        def piece(t: Tensor, s: Tensor) -> Tensor:
            return self.divergence(other.logits(t), self.split.logits(s)).sum()

        total = torch.zeros((), device=student.device)
        for t, s in self.split.chunks(teacher.flatten(0, 1), student.flatten(0, 1)):
            result: Any = checkpoint(piece, t, s, use_reentrant=False)
            total = total + result
        return total / student.shape[:2].numel()

    def _autocast(self, device: torch.device) -> torch.autocast:
        """bfloat16 on a GPU where weights that are multiplied are kept in float32 to be trained."""
        return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and self._trains_base())

    def _trains_base(self) -> bool:
        return self.settings.trainable != "heads"


def marked_fractions(gates: dict[int, Tensor], *, hard: bool) -> Tensor:
    """Of each layer, the mean of alpha = sigmoid(l) over tokens and heads; hard: of l > 0, with alpha's gradient
    (straight-through). gates: l by layer, float32 [tokens, heads]. Returns float32 [layers]."""
    alpha = torch.stack([gates[layer] for layer in sorted(gates)]).sigmoid()
    if hard:
        alpha = alpha + ((alpha > 0.5).float() - alpha).detach()
    return alpha.mean(dim=(1, 2))


def over_processes(local: Tensor) -> Tensor:
    """The mean of every process's values. Each keeps the gradient to its own, which the gradients' mean makes whole."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return local
    mean = local.detach().clone()
    dist.all_reduce(mean)
    return local + (mean / dist.get_world_size() - local.detach())
