"""Rewards: plain functions of one completion, and the pool of killable processes that calls them.

A reward is `f(completion, *, answer, prompt, meta, **its own options) -> float`:

    completion  str, as the student wrote it, including special tokens, but without the end token that stopped it
    answer      str, or None if the data has none
    prompt      str, the text of the last user message, without the marks of a chat template
    meta        dict, the other columns of the data, by name
    messages    list of dicts with role and content, the whole prompt; only if the function has this keyword, or **

It returns a number (also of NumPy or PyTorch, a Decimal, a Fraction) of at most LARGEST, or (number, text), where the
text is feedback on the completion. It may be a coroutine function; each worker awaits one call at a time. A function
that raises, hangs or returns anything else is a failed reward, never a 0.

Only `pool` and the files of `math` may import more than the standard library, since workers must start fast.
"""

LARGEST = 1e15
"""Bound on the absolute value of a reward: its square must fit in fp32, in which advantages are computed."""
