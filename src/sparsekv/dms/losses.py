"""The retrofit's loss: distillation from the model itself plus a one-sided pull towards the target ratio.

L = KL + max(0, target - fraction of marks), target = 1 - 1 / CR(step)      (arXiv 2506.05345, equations 3 and 4).

A divergence is named by its argument order, KL(first || second): "forward" and "reverse" mean different things to
different authors.
"""

import torch
from torch import Tensor


def kl_teacher_student(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL(teacher || student) in nats per token. Both: [..., vocab], any float dtype. Returns float32 [...]."""
    return _kl(teacher_logits, student_logits)


def kl_student_teacher(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL(student || teacher) in nats per token. Both: [..., vocab], any float dtype. Returns float32 [...]."""
    return _kl(student_logits, teacher_logits)


def _kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    log_p = p_logits.float().log_softmax(-1)
    log_q = q_logits.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def hinge(fraction: Tensor, target: float | Tensor) -> Tensor:
    """max(0, target - fraction): pulls while too little is marked. fraction: the mean of alpha or of hard marks."""
    return (target - fraction).clamp(min=0)


def hinge_sum(fraction: Tensor, target: float | Tensor, count: int) -> Tensor:
    """max(0, count * target - sum of alpha): the paper's, over `count` decisions. fraction: their mean."""
    return hinge(fraction, target) * count


def bernoulli_kl(fraction: Tensor, target: float | Tensor) -> Tensor:
    """KL(Bernoulli(target) || Bernoulli(fraction)) in nats: the two-sided alternative to the hinge."""
    f = fraction.clamp(1e-6, 1 - 1e-6)
    p = torch.as_tensor(target, dtype=f.dtype, device=f.device)
    return torch.xlogy(p, p / f) + torch.xlogy(1 - p, (1 - p) / (1 - f))
