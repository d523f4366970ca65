"""A small reasoning model for the study of hyper-scaling: written-out chains, fine-tuning on them, a look at it."""
