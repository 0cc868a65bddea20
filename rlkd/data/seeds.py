"""Random choices as functions of their name: the same in every process, and after a resume."""

from __future__ import annotations

import hashlib

import numpy as np


def generator(*key: int | str) -> np.random.Generator:
    """A generator that depends on `key` alone. Example: generator(seed, iteration, "coin", prompt.id).random()"""
    words = np.frombuffer(hashlib.sha256(repr(key).encode("utf-8", "surrogatepass")).digest(), dtype=np.uint32)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words.tolist())))


def request_seed(seed: int, iteration: int, prompt_id: str) -> int:
    """31 bits, the same in every process and Python version. The server samples completion i with this + i."""
    digest = hashlib.sha256(f"{seed}/{iteration}/{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
