"""The student: loading, LoRA adapters, and log-probs from hidden states."""
