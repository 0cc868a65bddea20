"""The limit on processor time for a comparison of answers."""

import time

import pytest

from rlkd.rewards.math_answer import math


@pytest.mark.long
def test_math_gives_up_a_comparison_that_sympy_does_not_end():
    given = {"prompt": "", "meta": {}}
    math(r"\boxed{1 + 1}", answer="2", **given)
    start = time.process_time()
    many = ",".join(map(str, range(300)))
    assert math(rf"\boxed{{{many}}}", answer=r"x^2 + \sqrt{2}", **given) == 0.0
    assert 2 < time.process_time() - start < 5
