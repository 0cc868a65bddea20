"""Rewards: plain functions of one completion, and the pool of killable processes that calls them.

A reward is `f(completion, *, answer, prompt, meta, **its own options) -> float`:

    completion  str, as the student wrote it, special tokens included; only the end token that stopped it is left out
    answer      str, or None where the data has none
    prompt      str, the last user message: what was asked, without a chat template's marks
    meta        dict, the other columns of the data, by name
    messages    list of dicts with role and content, the whole prompt; only for a function that has this keyword, or **

It returns a number (also of NumPy or PyTorch, a Decimal, a Fraction) of at most LARGEST, or (number, text): what it has
to say of the completion. A coroutine function works too; each worker awaits one call at a time. What raises, hangs or
returns anything else is a failed reward, never a 0.

Nothing in this package but `pool` and `math` may import more than the standard library: workers must start fast.
"""

LARGEST = 1e15
"""Of a reward, either way: its square must fit in 32 bits, where advantages and gradients are computed."""
