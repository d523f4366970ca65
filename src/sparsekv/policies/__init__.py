"""Every method is a rule for where the next token goes, and what the next query reads. One small file each."""

from sparsekv.policies.base import Policy, Prompt, Step
from sparsekv.policies.registry import make_policy, policy_names

__all__ = ["Policy", "Prompt", "Step", "make_policy", "policy_names"]
