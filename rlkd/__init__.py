"""rlkd: reinforcement learning and knowledge distillation of language models in one loop."""

__version__ = "0.1.0"
