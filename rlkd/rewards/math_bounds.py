"""Limits for mathematical answers, so that reading and comparing them is fast.

A model may write 9^{9^{9}}, which fits in a line and not in a computer. Sizes are estimated from the expression as it
was read, before anything in it is computed. A limit on processor time covers the rest.
"""

from __future__ import annotations

import math
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LONGEST = 4000
"""Characters of an answer, at most."""
DEEPEST = 10
"""Nested brackets, at most: the time of math-verify's parser doubles with each pair."""
DIGITS = 10_000.0
"""Decimal digits of the value of an answer, numerator or denominator: 3000! and 2^{30000} are within the limit."""
ROOT_DIGITS = 300.0
"""The same for a number under a root, since sympy tries to factorise it."""
TERMS = 300
"""Terms of an expanded power of a sum with variables."""
SECONDS = 3.0
"""Limit on processor time for reading two answers and comparing them."""

_LARGE_MATRIX = re.compile(r"\\operatorname\s*\{\s*(?:eye|zeros|ones)\b")


class TooLarge(Exception):
    """An expression that is too large to be computed."""


class OutOfTime(BaseException):
    """The limit on processor time is reached. A BaseException, since sympy catches many Exceptions and continues."""


def check_text(text: str) -> None:
    """Raises: TooLarge if the length of `text`, its brackets or the name of a matrix already exceed a limit."""
    if len(text) > LONGEST:
        raise TooLarge(f"it has {len(text)} characters, more than {LONGEST}")
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    if deepest > DEEPEST:
        raise TooLarge(f"it has {deepest} nested brackets, more than {DEEPEST}")
    if _LARGE_MATRIX.search(text):
        raise TooLarge("it names a matrix by its size")


def check(expression: Any) -> None:
    """Check every number that the evaluation of `expression`, a sympy expression, set or matrix, would create.

    Raises: TooLarge.
    """
    from sympy import Basic, MatrixBase

    if isinstance(expression, MatrixBase):
        for entry in expression.flat():
            _digits(entry)
    elif isinstance(expression, Basic):
        _digits(expression)


def _digits(e: Any) -> float:
    """Upper estimate of the decimal digits of numerator and denominator of `e`; about 1 for a variable.

    Raises: TooLarge if that, or an intermediate number, exceeds a limit.
    """
    from sympy import Add, Basic, Float, Mul, Pow, Product, Rational, Sum, binomial, exp, factorial, gamma

    if isinstance(e, Rational):
        return _bounded(0.30103 * max(abs(e.p).bit_length(), e.q.bit_length()))
    if isinstance(e, Float):
        _, mantissa, exponent, bits = e._mpf_
        return _bounded(0.30103 * abs(exponent + bits)) if mantissa else 1.0
    if not isinstance(e, Basic) or not e.args:
        return 1.0
    if isinstance(e, Pow | exp):
        return _power(*e.as_base_exp()) if isinstance(e, exp) else _power(e.base, e.exp)
    digits = [_digits(argument) for argument in e.args]
    if isinstance(e, Mul):
        return _bounded(sum(digits))
    if isinstance(e, Add):
        return _bounded(max(digits) + math.log10(len(digits)))
    if isinstance(e, factorial | gamma):
        n = _size(e.args[0], digits[0])
        return _bounded(n * math.log10(max(n, 10.0)))
    if isinstance(e, Sum | Product):
        terms = math.prod(_size(end - start, 1 + _digits(end) + _digits(start)) for _, start, end in e.limits)
        return _bounded(terms * digits[0])
    if isinstance(e, binomial):
        return _bounded(0.30103 * _size(e.args[0], digits[0]))
    return max(digits)


def _power(base: Any, exponent: Any) -> float:
    from sympy import Add, Integer

    inner, n = _digits(base), _size(exponent, _digits(exponent))
    if not isinstance(exponent, Integer) and exponent.is_number and not exponent.is_integer and inner > ROOT_DIGITS:
        raise TooLarge(f"it has a root of a number of about {inner:.0f} digits, more than {ROOT_DIGITS:.0f}")
    if isinstance(base, Add) and base.free_symbols:
        others = len(base.args) - 1
        if n > TERMS or math.comb(int(n) + others, others) > TERMS:
            raise TooLarge(f"it has a power of a sum with more than {TERMS} terms")
    return _bounded(n * inner)


def _size(e: Any, digits: float) -> float:
    """Upper estimate of |e|; `digits` is its own."""
    from sympy import Number

    if isinstance(e, Number) and e.is_finite:
        return abs(float(e)) if digits < 300 else math.inf
    return 10.0 ** min(digits, 300.0) if e.is_number else 10.0


def _bounded(digits: float) -> float:
    if not digits <= DIGITS:
        raise TooLarge(f"its value has more than {DIGITS:.0f} digits")
    return digits


@contextmanager
def processor_time(seconds: float = SECONDS) -> Iterator[None]:
    """Raise OutOfTime in the block after `seconds` of this process's processor time; in the main thread only.

    Processor time, so that a busy machine gives the same result. It is raised again if other code catches it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expired(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGVTALRM, expired)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    finally:  # again, since the signal may have interrupted the line above
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
