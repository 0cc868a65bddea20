"""Rewards: plain functions of one completion, and the pool of killable processes that calls them.

A reward is `f(completion: str, *, answer: str | None, prompt: str, meta: dict, **its own options) -> float`. Nothing
in this package but `pool` may import more than the standard library: worker processes must start fast.
"""
