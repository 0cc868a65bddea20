"""The cost model of benchmarks/: its limits, and FLOPs against torch's own count."""

from dataclasses import replace

import cost_model as cost
import pytest
import torch
from cost_model import Machine, Update, dense
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from rlkd.planning.memory import shape

SETTINGS = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    num_hidden_layers=3,
    intermediate_size=96,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=32,
    tie_word_embeddings=False,
)
TINY = dense(shape(SETTINGS), heads=2)
GPU = Machine(flops=1e14, memory=2e12, link=3e11, network=4e10, disk_write=2e9, disk_read=4e9, disk_total=4e10)
BLOCK = 4 * 64 * 64 + 3 * 64 * 96
NORMS = 3 * 2 * 64 + 64


def test_parameters_and_cache_of_a_dense_model_by_hand():
    assert TINY.parameters == 3 * BLOCK + NORMS + 2 * 128 * 64
    assert TINY.active == 3 * BLOCK + NORMS + 128 * 64
    assert TINY.cache == 3 * 2 * 64
    assert TINY.attention == 3 * 4 * 64


@pytest.mark.parametrize("tokens", [16, 48])
def test_flops_of_forward_and_backward_are_those_that_torch_counts(tokens):
    """Torch counts the full square of scores and no norms; so does the cost model, at a context of all tokens."""
    hf = LlamaForCausalLM._from_config(SETTINGS, attn_implementation="eager")
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        logits = hf(input_ids=ids, use_cache=False).logits
    forward = counter.get_total_flops()
    with counter:
        logits.sum().backward()
    ours = cost.trunk(TINY, tokens, tokens, 4).flops + 2 * tokens * TINY.output_layer - 2 * tokens * NORMS
    # and the table of rotary angles: head width / 2 products per token
    assert forward == pytest.approx(ours, rel=1e-3)
    assert counter.get_total_flops() == pytest.approx(
        2 * forward, rel=2e-3
    )  # the counter was reset: only the backward pass


def test_an_update_is_six_flops_a_parameter_and_token_and_four_where_weights_are_frozen():
    machine = Machine(flops=1.0, memory=float("inf"))
    none = replace(TINY, attention=0.0)
    whole = cost.training(none, machine, Update(tokens=10, projected=7, length=1, micro_batches=1))
    assert whole == 10 * 6 * TINY.blocks + 7 * 8 * TINY.output_layer  # the kernel computes its logits twice
    adapted = cost.training(none, machine, Update(tokens=10, projected=7, length=1, micro_batches=1, adapters=5))
    assert adapted == 10 * (4 * TINY.blocks + 6 * 5) + 7 * 8 * TINY.output_layer


def test_a_decode_step_is_bound_by_memory_with_few_rows_and_by_arithmetic_with_many():
    wide = replace(GPU, memory=2 * GPU.memory)
    fast = replace(GPU, flops=2 * GPU.flops)
    few, many = ((TINY, machine, rows, 0.0, 1) for rows in (1, 10_000) for machine in (GPU,))
    assert cost.served_step(TINY, wide, 1, 0.0, 1) == pytest.approx(cost.served_step(*few) / 2)
    assert cost.served_step(TINY, fast, 1, 0.0, 1) == cost.served_step(*few)
    assert cost.served_step(TINY, fast, 10_000, 0.0, 1) == pytest.approx(cost.served_step(*many) / 2)
    assert cost.served_step(TINY, wide, 10_000, 0.0, 1) == cost.served_step(*many)


def test_a_decode_step_reads_weights_once_and_every_cache():
    read = 2 * (TINY.active + 8 * 100 * 3 * 2 * 64)
    assert cost.served_step(TINY, GPU, 8, 100.0, 1) == pytest.approx(read / 2e12)


def test_experts_without_tokens_are_not_read():
    mixture = replace(TINY, routed=TINY.blocks / 2, chosen=0.25)
    fixed = mixture.blocks - 0.25 * mixture.routed
    assert cost.touched(mixture, 1) == pytest.approx(mixture.blocks)
    assert cost.touched(mixture, 2) == pytest.approx(fixed + mixture.routed * (1 - 0.75**2))
    assert cost.touched(mixture, 1e6) == pytest.approx(fixed + mixture.routed)


def test_a_rollout_with_room_for_all_takes_the_steps_of_the_longest():
    machine = replace(GPU, flops=float("inf"), memory=float("inf"), step=0.01)
    assert cost.served_rollout(TINY, machine, 8, 8, 4, 100, 1, 4) == pytest.approx(100 * 0.01)
    # 24 more completions of 50 tokens on average, 8 at a time
    assert cost.served_rollout(TINY, machine, 32, 8, 4, 100, 1, 4) == pytest.approx((100 + 24 * 50 / 8) * 0.01)


def test_arithmetic_hides_communication_above_some_batch_size():
    machine = replace(GPU, flops=1e12)
    small = cost.gpu_training(TINY, machine, 8, 4, 4, 8, 1024)
    large = cost.gpu_training(TINY, machine, 8 * 1024, 4 * 1024, 4, 8, 1024)
    assert small.communication == large.communication > small.compute
    assert large.compute == pytest.approx(1024 * small.compute)
    assert large.total == large.compute + large.optimizer


def test_publishing_sends_the_servers_dtype_once_to_any_number_of_servers():
    count = cost.published_bytes(TINY)
    assert count == 2 * TINY.parameters
    assert cost.gather_seconds(count, GPU, 4) == pytest.approx(3 / 4 * 2 * TINY.parameters / 3e11)
    assert cost.nccl_seconds(count, GPU) == pytest.approx(2 * TINY.parameters / 4e10)
    # one writer at 2e9; one reader at 4e9; 20 readers share 4e10
    assert cost.disk_seconds(4e9, GPU, 1) == 2 + 1
    assert cost.disk_seconds(4e9, GPU, 20) == 2 + 2


def test_in_process_one_rank_publishes_nothing_and_adapters_are_merged():
    machine = Machine(flops=1.0, memory=1.0, link=1.0, publish=5.0)
    assert cost.publishing(TINY, machine, 1, merged=False) == 5
    assert cost.publishing(TINY, machine, 1, merged=True) == 5 + 24 * TINY.parameters
    assert cost.publishing(TINY, machine, 2, merged=False) == 5 + (16 + 4 / 2) * TINY.parameters


def test_a_machine_loads_its_shards_once():
    assert cost.loading_bytes(1e9, 1 / 2, 0) == pytest.approx(1.1 * 4e9 / 2)
    assert cost.loading_bytes(1e9, 1 / 64, 1e8) == 4e8  # what rank 0 checks is more than its shards


def test_only_completions_are_projected_and_prompts_are_read_once_a_group():
    machine, none = Machine(flops=1.0, memory=float("inf")), replace(TINY, attention=0.0)
    trained = cost.gpu_training(none, machine, 40, 28, 10, 4, 1024)
    assert trained.compute == 10 * 8 * TINY.blocks + 7 * 8 * TINY.output_layer  # blocks run forward twice
    assert cost.scoring(none, machine, 10, 7, 10, 1) == 10 * 2 * TINY.blocks + 7 * 2 * TINY.output_layer
    assert cost.rollout(none, machine, 8, 5, 1, group=4) == 2 * 5 * 2 * TINY.blocks
