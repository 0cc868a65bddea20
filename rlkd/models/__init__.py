"""The student model: loading, LoRA adapters, and log-probs from hidden states."""
