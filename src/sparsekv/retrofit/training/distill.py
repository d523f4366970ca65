"""The loss of a retrofit as one module, so that whatever wraps a model for many devices wraps all of it.

L = D(teacher, student with soft gates) + pull(target, fraction of marks)      (arXiv 2506.05345, section 3.2)

The teacher is the student's own base weights with eviction off where those are frozen (heads alone; heads with LoRA,
whose weights are then left out), else a second, frozen model. The text's length times the vocabulary never exists at
once: the divergence and its gradient go through the output head a few positions at a time.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sparsekv import dmc, dms
from sparsekv.modeling import contexts
from sparsekv.modeling.attach import attachment_of
from sparsekv.modeling.contexts import SoftGates
from sparsekv.modeling.split import Divergence, SplitModel
from sparsekv.policies.dms import DMSPolicy
from sparsekv.retrofit.config import RetrofitConfig

NOTHING = -1e6
"""An offset at which no logit marks anything, and to which no gradient flows."""
QUANTILES = 256
"""Equal shares of the logits, between which their shifts are rounded."""
SAMPLE = 1 << 20
"""About as many logits are sorted for them."""

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
    keep: float | None = None
    """The share of a neuron source's channel that is kept in a step that marks nothing."""
    full: float | None = None
    """The fraction that the logits are trained to reach, where they are shifted to give `target` instead."""


class Distillation(nn.Module):
    """student: attached with DMS or DMC, within contexts.soft; teacher: None where the student's frozen base is one."""

    def __init__(
        self, student: PreTrainedModel, config: RetrofitConfig, *, teacher: PreTrainedModel | None = None
    ) -> None:
        super().__init__()
        self.student, self.teacher, self.settings = student, teacher, config
        with contexts.original(student), torch.no_grad():
            self.split = SplitModel(student)
        self.teacher_split = None if teacher is None else SplitModel(teacher)
        self.divergence = _DIVERGENCES[config.divergence]
        self.quantiles: Tensor
        self.target: Tensor
        device = next(student.parameters()).device
        self.register_buffer("quantiles", torch.zeros(QUANTILES + 1, device=device))
        self.register_buffer("target", torch.zeros((), device=device), persistent=False)
        layers = {name for model in (student, teacher) if model for name in model._no_split_modules or ()}
        self._no_split_modules = sorted(layers & {type(module).__name__ for module in self.modules()})
        """What FSDP gathers at a time, by the name that accelerate asks for; without it, everything at once."""

    def train(self, mode: bool = True) -> Self:
        """As a module's, but a second model never drops out anything."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, input_ids: Tensor, draw: Draw, documents: Tensor | None = None) -> dict[str, Tensor]:
        """input_ids: int64 [B, S]; documents: as SplitModel.hidden takes them. Returns float32 "loss", "divergence",
        "pull" and "fractions" [layers], the marked fraction of each; all but the loss over the rows of all
        processes."""
        self.begin(draw)
        return self.compare(input_ids, documents)

    def begin(self, draw: Draw) -> None:
        """What the host decides of the next forward."""
        gates, policy = self._gates()
        policy.offset, attachment_of(self.student).keep = self.offset_for(draw), draw.keep or 0.0
        gates.begin(seed=draw.seed, part=draw.part, parts=draw.parts)
        self.target.fill_(draw.target)

    def compare(self, input_ids: Tensor, documents: Tensor | None = None) -> dict[str, Tensor]:
        """The rest of `forward`, which only the device need do."""
        config = self.settings
        gates, policy = self._gates()
        with self._autocast(input_ids.device):
            teacher = self._teach(input_ids, documents)
            student = self.split.hidden(input_ids, documents=documents)
            divergence = self._diverge(teacher, student)
        self._remember(gates, policy.offset_on(input_ids.device))
        fractions = over_processes(marked_fractions(gates.gates, hard=config.fraction == "hard"))
        count = sum(gate.numel() for gate in gates.gates.values()) // len(input_ids)
        if config.pull == "hinge_text":
            alphas = [gate.sigmoid().unflatten(0, (len(input_ids), -1)) for gate in gates.gates.values()]
            pull = dmc.compression_loss(alphas, self.target)
        else:
            pull = pull_to(self.target, fractions.mean(), kind=config.pull, count=count)
        return {
            "loss": divergence + pull,
            "divergence": over_processes(divergence.detach()),
            "pull": over_processes(pull.detach()),
            "fractions": fractions.detach(),
        }

    def offset_for(self, draw: Draw) -> float:
        """The shift of the logits at which `target` of them were marked in the last step, were `full` without it."""
        if draw.keep is not None:
            return NOTHING
        if draw.full is None:
            return 0.0
        full, target = (self.quantiles[round((1 - x) * QUANTILES)] for x in (draw.full, draw.target))
        return float(full - target)

    def _gates(self) -> tuple[SoftGates, DMSPolicy]:
        attachment = attachment_of(self.student)
        gates, policy = attachment.gates, attachment.policy
        assert isinstance(gates, SoftGates) and isinstance(policy, DMSPolicy), "training runs within contexts.soft"
        return gates, policy

    @torch.no_grad()
    def _remember(self, gates: SoftGates, offset: Tensor) -> None:
        """The quantiles of z + g, without the offset: at offset o, a share P(z + g + o > 0) is marked."""
        if self.settings.hold != "random" or not self.settings.hold_steps:
            return
        z = torch.cat([gate.detach().flatten() for gate in gates.gates.values()]) * gates.tau - offset
        ordered = z[:: max(1, len(z) // SAMPLE)].sort().values
        at = torch.linspace(0, len(ordered) - 1, QUANTILES + 1, device=z.device).long()
        self.quantiles.copy_(over_processes(ordered[at]))

    @torch.no_grad()
    def _teach(self, ids: Tensor, documents: Tensor | None) -> Tensor:
        if self.teacher_split is not None:
            return self.teacher_split.hidden(ids, documents=documents)
        with contexts.original(self.student):
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
            result: Any = checkpoint(piece, t, s, use_reentrant=False, preserve_rng_state=False)  # draws nothing
            total = total + result
        return total / student.shape[:2].numel()

    def _autocast(self, device: torch.device) -> torch.autocast:
        """bfloat16 on a GPU where weights that are multiplied are kept in float32 to be trained."""
        return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and self._trains_base())

    def _trains_base(self) -> bool:
        return self.settings.trainable != "heads"


def pull_to(target: float | Tensor, fraction: Tensor, *, kind: str, count: int) -> Tensor:
    """The loss that moves the fraction of marks to the target. count: decisions per row, for the sum."""
    if kind == "hinge_sum":
        return dms.hinge_sum(fraction, target, count)
    return (dms.hinge if kind == "hinge_mean" else dms.bernoulli_kl)(fraction, target)


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
