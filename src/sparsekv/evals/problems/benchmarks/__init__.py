"""The benchmarks of arXiv 2506.05345 with chains of thought, from files or the hub: prompts, answers, scoring."""
