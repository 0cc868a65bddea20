"""Samplers, which generate completions in this process or on vLLM servers."""
