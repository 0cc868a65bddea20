"""The LightningModules that `rlkd.algorithms` hands out."""

import pickle

import pytest

import rlkd.algorithms
from rlkd.algorithms.base import Algorithm
from rlkd.algorithms.grpo import GRPO
from rlkd.algorithms.registry import OPTIONS
from rlkd.training.module import PolicyModule


def test_a_public_name_is_one_class():
    assert rlkd.algorithms.GRPO is rlkd.algorithms.GRPO
    assert issubclass(rlkd.algorithms.GRPO, PolicyModule) and rlkd.algorithms.GRPO.Algorithm is GRPO
    assert not issubclass(rlkd.algorithms.GRPO, Algorithm)


def test_every_built_in_algorithm_has_a_public_module_that_pickle_finds():
    assert {name.lower() for name in rlkd.algorithms.__all__} == set(OPTIONS)
    for name in rlkd.algorithms.__all__:
        module = getattr(rlkd.algorithms, name)
        assert pickle.loads(pickle.dumps(module)) is module and module.__name__ == name


def test_a_module_that_answers_for_its_algorithm_is_refused():
    with pytest.raises(TypeError, match="credit.*rlkd.algorithms.grpo.GRPO"):
        type("Mine", (rlkd.algorithms.GRPO,), {"credit": lambda self, group: [0.0] * len(group)})
