"""How often an update makes the host wait for the device: each time, a GPU runs out of work.

Nothing waits on a CPU, so the operations that would wait on a GPU are counted: those whose result is a number or a
shape that Python needs. What was copied by `Tensor.cpu`, and what is computed from that, is on the host already.
"""

from collections import Counter

import pytest
import torch
from builders import Captured, config, real_batch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from rlkd.training.module import PolicyModule

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique2", "_unique2", "repeat_interleave"}
"""`item`, `float`, `int`, `bool` and `is_nonzero` are all the first one."""
COPIES = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy}


class _Operations(TorchDispatchMode):
    def __init__(self, found, host):
        super().__init__()
        self.found, self.host = found, host

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, result = function.overloadpacket.__name__, function(*args, **(kwargs or {}))
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if read and all(tensor in self.host for tensor in read):
            self.host.update({x: True for x in tree_leaves(result) if isinstance(x, torch.Tensor)})
            return result
        masks = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        if name in WAITING or any(mask is not None and mask.dtype == torch.bool for mask in masks):
            self.found[name] += 1
        return result


class _Copies(TorchFunctionMode):
    def __init__(self, found, host):
        super().__init__()
        self.found, self.host = found, host

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in COPIES:
            self.found[function.__name__] += 1
        if function is torch.Tensor.cpu:
            self.host[result] = True
        return result


@pytest.fixture
def waits(monkeypatch):
    """A function from overrides to (the waits of a run's only update by operation, its micro-batches)."""
    update, micro_batches = PolicyModule._update, PolicyModule._micro_batches

    def counted(*overrides):
        found, sizes, host = Counter(), [], WeakIdKeyDictionary()

        def counting(*args):
            with _Operations(found, host), _Copies(found, host):
                return update(*args)

        def noting(*args):
            parts = micro_batches(*args)
            sizes.append(len(parts))
            return parts

        monkeypatch.setattr(PolicyModule, "_update", counting)
        monkeypatch.setattr(PolicyModule, "_micro_batches", noting)
        settings = config("rollout.prompts=8", "rollout.max_tokens=16", "optim.max_grad_norm=1.0", *overrides)
        captured = Captured(settings, real_batch(settings))
        # AdamW reads a counter of each parameter, which is on the CPU on any machine.
        found["_local_scalar_dense"] -= len(captured.gradients)
        (size,) = sizes
        return found, size

    return counted


@pytest.mark.parametrize(
    ("overrides", "each", "once"),
    [
        (("algorithm={name: grpo, group_size: 4}", "teacher=null"), 2, 12),
        (("algorithm={name: kdrl, group_size: 4}",), 2, 12),
        (("algorithm={name: opd, group_size: 4, divergence: {tier: full}}",), 3, 12),
    ],
)
def test_a_micro_batch_makes_the_host_wait_only_a_few_times(waits, overrides, each, once):
    """Ceilings: of a micro-batch, and of all else in an update. In a micro-batch these are transformers' look for
    packed sequences, and the positions of the tokens that are projected, and of those with a divergence."""
    few, many = (waits(f"trainer.micro_batch_tokens={tokens}", *overrides) for tokens in (512, 64))
    assert many[1] > few[1] + 4
    slope = (many[0].total() - few[0].total()) / (many[1] - few[1])
    rest = few[0].total() - slope * few[1]
    print(f"{overrides[0]}: {slope:.1f} a micro-batch, {rest:.0f} once an update; {dict(many[0])} in {many[1]}")
    assert slope <= each and rest <= once
