"""A run around the line: publishing, evaluation, checkpoints, exports and logs, as callbacks of the trainer."""
