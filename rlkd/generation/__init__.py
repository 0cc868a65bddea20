"""Samplers: who writes completions, in this process or on vLLM servers."""
