"""Dynamic Memory Sparsification as mathematics: pure functions and one small module (arXiv 2506.05345).

Uses nothing else of sparsekv. Positions count from 0; one logit per token and KV head.
"""

from sparsekv.dms.heads import EvictionHead, NeuronSource, linear_logits, neuron_logits, zero_neuron_
from sparsekv.dms.losses import bernoulli_kl, hinge, hinge_sum, kl_student_teacher, kl_teacher_student
from sparsekv.dms.schedule import compression_ratio, target_fraction
from sparsekv.dms.visibility import align, hard_log_keep, log_keep, logistic, marks, visible

__all__ = [
    "EvictionHead",
    "NeuronSource",
    "align",
    "bernoulli_kl",
    "compression_ratio",
    "hard_log_keep",
    "hinge",
    "hinge_sum",
    "kl_student_teacher",
    "kl_teacher_student",
    "linear_logits",
    "log_keep",
    "logistic",
    "marks",
    "neuron_logits",
    "target_fraction",
    "visible",
    "zero_neuron_",
]
