"""Every method is a rule for where the next token goes, and what the next query reads. One small file each."""

from sparsekv.policies.base import Policy, Step, decode_layer, prefill_layer
from sparsekv.policies.registry import make_policy, policy_names

__all__ = ["Policy", "Step", "decode_layer", "make_policy", "policy_names", "prefill_layer"]
