"""Finds numbers that math-verify considers equal only because both are small.

It compares decimals after rounding to six places, and other numbers by their difference, which may be up to 1e-15. So
1e-7 equals 2e-7 there, and the charge of an electron equals Planck's constant.
"""

from __future__ import annotations

from itertools import product
from typing import Any

RELATIVE = 1e-4
"""Numbers that differ by more than this part of the larger one are different, however small both are."""


def apart(one: Any, other: Any) -> bool:
    """Whether two expressions that math-verify considers equal have different numbers in them.

    Compares equations with a number on the right, sets, tuples, intervals and matrices; False for anything else.
    """
    from sympy import Expr, FiniteSet, Interval, MatrixBase, Tuple

    one, other = _right_sides(one, other)
    if isinstance(one, MatrixBase) and isinstance(other, MatrixBase):
        return one.shape == other.shape and any(map(apart, one.flat(), other.flat()))
    if isinstance(one, Interval) and isinstance(other, Interval):
        return apart(one.start, other.start) or apart(one.end, other.end)
    if isinstance(one, FiniteSet) and isinstance(other, FiniteSet):  # in any order
        lonely = [all(apart(a, b) for b in other.args) for a in one.args]
        return any(lonely) or any(all(apart(a, b) for a in one.args) for b in other.args)
    if isinstance(one, Tuple | FiniteSet) and isinstance(other, Tuple | FiniteSet):
        left, right = (getattr(e, "_unsorted_args", e.args) for e in (one, other))
        return len(left) == len(right) and any(map(apart, left, right))
    if isinstance(one, Expr) and isinstance(other, Expr) and one.is_number and other.is_number:
        return all(_far(a, b) for a, b in product(_values(one), _values(other)))
    return False


def _right_sides(one: Any, other: Any) -> tuple[Any, Any]:
    """The right sides of two equations with the same left side, or of one equation and a bare number."""
    from sympy import Eq

    if isinstance(one, Eq) and isinstance(other, Eq):
        return (one.rhs, other.rhs) if one.lhs == other.lhs else (one, other)
    return one.rhs if isinstance(one, Eq) else one, other.rhs if isinstance(other, Eq) else other


def _values(number: Any) -> list[Any]:
    """The possible values of `number`: in math-verify 9 % is 0.09, and also 9."""
    from sympy import UnevaluatedExpr

    found = [number.doit().evalf(15)]
    for hundredth in number.atoms(UnevaluatedExpr):
        found.append(number.xreplace({hundredth: 1}).doit().evalf(15))
    return found


def _far(a: Any, b: Any) -> bool:
    from sympy import Float

    if not (a.is_finite and b.is_finite) or any(x._prec < 10 for n in (a, b) for x in n.atoms(Float)):
        return False  # infinite, or a sum that cancels to nothing: its digits mean nothing
    return bool((abs(a - b) - RELATIVE * max(abs(a), abs(b))).evalf(15) > 0)
