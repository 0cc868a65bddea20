"""Everything a run does around the training loop: publishing weights, evaluation, checkpoints, exports and logs."""
