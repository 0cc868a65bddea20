"""The memory estimate against models that are really built, trained and sampled from."""

import pytest
import torch
from builders import Captured, config, real_batch
from transformers import DynamicCache, Qwen2Config
from vllm_fixtures import tiny_model

from rlkd.algorithms.registry import ALGORITHMS
from rlkd.command_line import GPUs, parse
from rlkd.config.load import ConfigError
from rlkd.models.lora import inject
from rlkd.models.student import blocks, load_causal_lm
from rlkd.planning.memory import (
    adapter_parameters,
    block_activations,
    kv_bytes,
    report,
    server_places,
    shape,
    shape_of,
    trainer_place,
)
from rlkd.train import command, main

# From the model cards: Qwen2.5-7B has 7.61 billion parameters, 6.53 without embeddings; 28 layers, 28 query
# heads and 4 key-value heads of 128.
QWEN_7B = Qwen2Config(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
    dtype="bfloat16",
)


def part(parts, what):
    (found,) = [p for p in parts if p.what == what]
    return found.bytes


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_a_model_that_is_built(tied):
    hf = tiny_model(0, tied=tied)
    known = shape(hf.config)
    assert known.parameters == sum(p.numel() for p in hf.parameters())
    assert known.largest_block == sum(p.numel() for p in hf.model.layers[0].parameters())
    assert known.outside == known.parameters - 2 * known.largest_block
    assert known.output_layer == hf.lm_head.weight.numel()


def test_a_7b_model_has_the_parameters_of_its_card_and_a_gqa_cache_of_56_kib_a_token():
    known = shape(QWEN_7B)
    assert known.parameters / 1e9 == pytest.approx(7.61, abs=0.01)
    assert (known.parameters - 2 * known.output_layer) / 1e9 == pytest.approx(6.53, abs=0.01)
    assert kv_bytes(known, 2) == 2 * 28 * 4 * 128 * 2 == 56 * 1024


def test_the_cache_of_a_token_is_that_of_transformers():
    """The teacher has fewer key heads than query heads."""
    hf = load_causal_lm("builtin:teacher", torch.float32, attention=None, trust_remote_code=False)
    cache = hf(input_ids=torch.zeros(3, 5, dtype=torch.int64), past_key_values=DynamicCache()).past_key_values
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert held == 3 * 5 * kv_bytes(shape_of("builtin:teacher"), 4)


def test_what_a_training_step_keeps_is_what_is_estimated(tmp_path):
    settings = config("trainer.accelerator=cpu", f"run.dir={tmp_path}")
    trained = Captured(settings, real_batch(settings))
    resident = trainer_place(settings).resident
    assert part(resident, "gradients") == sum(t.nbytes for t in trained.gradients.values())
    assert part(resident, "master weights") == sum(t.nbytes for t in trained.parameters.values())
    moments = [t for state in trained.optimizer.state.values() for t in state.values() if t.ndim > 0]
    assert part(resident, "AdamW's moments") == sum(t.full_tensor().nbytes for t in moments)
    assert "hf sampler" not in {p.what for p in resident}  # it reads the master weights
    halves = trainer_place(config("trainer.devices=2", "trainer.precision=fp32")).resident
    assert part(halves, "hf sampler") == part(resident, "master weights")
    assert part(halves, "AdamW's moments") == part(resident, "AdamW's moments") / 2
    ahead = trainer_place(config("trainer.accelerator=cpu", "rollout.max_staleness=1")).resident
    assert part(ahead, "hf sampler") == part(halves, "hf sampler") == part(resident, "master weights")


def test_a_sharded_teacher_takes_its_outside_and_a_share_of_its_blocks():
    local, known = "teacher={backend: local, path: 'builtin:teacher'}", shape_of("builtin:teacher")
    for ranks, sharded in ((4, False), (4, True), (2, True)):
        options = (local, f"trainer.devices={ranks}", f"trainer.shard_frozen={str(sharded).lower()}")
        blocks_held = (known.parameters - known.outside) / ranks
        expected = 4 * (known.outside + blocks_held if sharded else known.parameters)
        assert part(trainer_place(config(*options)).resident, "teacher") == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_of_a_block_are_what_autograd_keeps(dtype):
    """Without the softmax statistics and the rotary angles, which are small in comparison in a real model."""
    hf = tiny_model(0, tied=False).to(dtype)
    known, tokens, storages = shape(hf.config), 2 * 64, {}
    weights = {p.untyped_storage().data_ptr() for p in hf.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.zeros(2, 64, dtype=torch.int64)
    kept = []
    for layers in (1, 2):
        hf.config.num_hidden_layers = layers
        storages.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            states = hf.model(input_ids=ids, use_cache=False).last_hidden_state
        kept.append(sum(size for size, _ in storages.values()))
        del states
    assert len(blocks(hf)) == 2
    a_block = (kept[1] - kept[0]) / tokens
    assert block_activations(known, dtype.itemsize) == pytest.approx(a_block, rel=0.15)


def test_a_report_says_what_fits_and_what_does_not(tmp_path, capsys):
    QWEN_7B.save_pretrained(tmp_path)
    command = [
        "--config",
        "configs/kdrl.yaml",
        f"model.path={tmp_path}",
        f"teacher.path={tmp_path}",
        "data.path=x.jsonl",
    ]
    small, large = ["trainer.devices=1"], ["trainer.devices=8", "rollout.server.devices=[[8]]"]
    for devices, code in ((small, 1), ([*large, "teacher.server.devices=[[9,10]]"], 0)):
        assert main([*command, *devices, "--estimate=80"]) == code
    one, eight = capsys.readouterr().out.split("student: ")[1:]
    # 16 bytes per parameter, as in ZeRO (arXiv 1910.02054, §3.1), there with half-precision copies.
    assert "28.37 GiB  master weights: 4 B · 7.62e9 parameters / 1" in one
    assert "DOES NOT FIT in 80.00 GiB" in one and "DOES NOT FIT" not in eight
    assert "7.09 GiB  AdamW's moments: 2 · 4 B · 7.62e9 parameters / 8" in eight
    # The embedding has 152,064 · 3,584 parameters; it is gathered in fp32 and leaves in bf16.
    assert "3.05 GiB  while publishing: (4 + 2) B · the largest tensor, 0.545e9 parameters, on every rank" in eight
    # (0.85 · 80 − 14.19) GiB over 5,120 tokens of 56 KiB
    assert "14.19 GiB  weights" in eight and "= 68.00 GiB, 196 such sequences side by side" in eight
    assert "7.09 GiB  weights: 2 B · 7.62e9 parameters / 2" in eight and "28 KiB each" in eight
    assert main([*command, "model.path=nowhere/at/all", "--estimate"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("--estimate: nowhere/at/all: ")


def test_every_model_of_a_trainer_is_counted():
    own = "teacher={backend: self, weights: ema, dtype: bfloat16}"
    settings = config("algorithm={name: opsd}", own, "rollout.backend=hf", group_size=None)
    student = shape_of("builtin:student").parameters
    resident = trainer_place(settings).resident
    assert part(resident, "teacher (self)") == 2 * student and part(resident, "teacher's moving average") == 4 * student
    head = load_causal_lm("builtin:student", torch.bfloat16, attention=None, trust_remote_code=False).lm_head
    assert part(resident, "output layer of a batch") == head.weight.nbytes
    fixed = config("algorithm={name: opsd}", own.replace("ema", "fixed"), "rollout.backend=hf", group_size=None)
    assert "output layer of a batch" not in [p.what for p in trainer_place(fixed).resident]
    settings = config("algorithm.reference_coef=0.1")
    assert ALGORITHMS["kdrl"](settings).needs_reference
    assert part(trainer_place(settings).resident, "reference") == 4 * student
    sharded = config("algorithm.reference_coef=0.1", "trainer.devices=2", "trainer.shard_frozen=true")
    for what, path in (("reference", "builtin:student"), ("teacher", "builtin:teacher")):
        known = shape_of(path)
        found = part(trainer_place(sharded).resident, what)
        assert found == 4 * (known.outside + (known.parameters - known.outside) / 2)
    assert part(trainer_place(settings).resident, "teacher") == 4 * shape_of("builtin:teacher").parameters


def test_without_a_known_device_the_report_does_not_mention_it():
    assert "give the size of the device by --estimate=GIB" in report(config("trainer.accelerator=auto"), None)
    assert server_places(config()) == []
    with pytest.raises(ConfigError, match="--estimate: .*'big'.*--estimate=80"):
        parse(command, ["--config", "x.yaml", "--estimate=big"])
    for nothing in ("0", "0.0", "8x0", "0x80", "1000000000x80"):
        with pytest.raises(ConfigError, match=f"--estimate: .*'{nothing}'"):
            parse(command, ["--config", "x.yaml", f"--estimate={nothing}"])
    for flag, gpus in {"--estimate=80.5": GPUs(80.5), "--estimate=8x0.5": GPUs(0.5, 8), "--estimate": GPUs()}.items():
        assert parse(command, ["--config", "x.yaml", flag, "a.b=1"])["estimate"] == gpus
    assert parse(command, ["--config", "x.yaml"])["estimate"] is None


def test_adapters_are_counted_as_they_are():
    settings = config("model.lora={r: 4, alpha: 8}", "rollout.backend=hf")
    hf = load_causal_lm("builtin:student", torch.float32, attention=None, trust_remote_code=False)
    inject(hf, settings.model.lora, seed=0)
    trained = sum(p.numel() for p in hf.parameters() if p.requires_grad)
    assert adapter_parameters(settings) == trained > 0
    parts = {part.what: part.bytes for part in trainer_place(settings).resident}
    assert parts["AdamW's moments"] == 8 * trained and parts["adapters"] == parts["gradients"] == 4 * trained
