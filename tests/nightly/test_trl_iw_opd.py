"""The same numbers as TRL 1.16's IW-OPD, whose module imports vLLM for 20 seconds."""

import pytest
import torch
from divergence_reference import gradients, normal

from rlkd.losses import divergence, restrict_to

B, T, V, K = 2, 9, 40, 6


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize(("beta", "kind"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_iw_opd_chooses_the_support_by_beta_and_we_by_name(beta, kind, tail):
    """IW-OPD: the teacher's top k for the forward KL, the student's for the reverse KL.

    For the JSD it takes the union of both. We do not, since a served teacher cannot score the student's tokens, and the
    top k of one side always has the same size.
    """
    from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer

    student = normal(1, B, T, V, dtype=torch.float32, scale=2.0).requires_grad_()
    teacher = normal(2, B, T, V, dtype=torch.float32, scale=2.0)
    trl = IWOPDTrainer.generalized_jsd_loss(student, teacher, beta=beta, reduction="none", top_k=K, add_tail=tail).sum(
        -1
    )
    ids = (teacher if kind == "forward_kl" else student).topk(K, dim=-1).indices
    ours = divergence(*(restrict_to(x.log_softmax(-1), ids, tail) for x in (student, teacher)), kind, beta)
    torch.testing.assert_close(ours, trl, atol=1e-5, rtol=1e-5)
    uneven = torch.linspace(0.5, 2.0, ours.numel()).view(ours.shape)
    slopes = [gradients((value * uneven).sum(), student)[0] for value in (ours, trl)]
    assert slopes[1].abs().max() > 1e-3
    torch.testing.assert_close(*slopes, atol=1e-5, rtol=1e-5)
