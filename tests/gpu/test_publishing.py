"""Weights that reach a server on the same GPU are the ones that sample, and nothing grows while they do."""

import copy
import time
from collections.abc import Iterator

import pytest
import torch
from gpu_models import RandomModel, tiny_qwen, wide_embedding
from gpu_runs import resident_gib, sampling_config, serving, used_gib
from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer
from vllm_fixtures import mismatch, prompts, save_model, true_logprobs

from rlkd.generation.sampler import Sampling
from rlkd.models.weights import Part, Weights, Whole

pytestmark = pytest.mark.gpu

GREEDY = Sampling(temperature=0.0, max_tokens=16, seed=0)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_g1_a_published_model_is_the_one_that_samples(tied, tmp_path, figure):
    """Names, reloading, the tied output layer, biases, the versions, and log-probs of vLLM's runner for GPUs."""
    published = tiny_qwen(1, tied)
    path = save_model(tiny_qwen(0, tied), tmp_path / "model")
    exact = ("rollout.server.dtype=float32", "rollout.server.weight_sync=file")
    config = sampling_config(path, tmp_path, *exact)
    weights = Whole(copy.deepcopy(published).to("cuda").state_dict())
    with serving(config) as sampler:
        started = time.perf_counter()
        sampler.publish(weights, 1)
        seconds = time.perf_counter() - started
        worst = mismatch(sampler, published, 1)
        regret = 0.0
        for (rollout,) in sampler.sample(prompts(8), n=1, iteration=0, sampling=GREEDY):
            chosen = true_logprobs(published, rollout.prompt.token_ids, rollout.token_ids)
            ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]])
            with torch.no_grad():
                best = published(ids).logits[0, len(rollout.prompt.token_ids) - 1 : -1].log_softmax(-1).amax(-1)
            regret = max(regret, float((best - chosen).max()))
    figure(f"largest |Δ log-prob| {worst:.1e}, greedy below the best token by {regret:.1e}, publish {seconds:.2f} s")
    assert worst < 0.02 and regret < 0.02


def test_g3_ipc_carries_a_tensor_of_more_than_a_gib_and_nothing_grows(tmp_path, figure):
    shape = RandomModel(tmp_path / "model", wide_embedding())
    config = sampling_config(shape.path, tmp_path, "rollout.server.weight_sync=ipc", "rollout.server.memory=0.2")
    model = shape.made()
    model.save_pretrained(shape.path)
    embedding = model.get_input_embeddings().weight
    assert embedding.nbytes > 1.1 * 2**30
    with serving(config) as sampler:
        (server,) = sampler.pool.servers
        seconds, gpu, host = [], [], []
        for version in range(1, 21):
            with torch.no_grad():
                embedding.normal_(std=2.5 / model.config.hidden_size**0.5)
            started = time.perf_counter()
            sampler.publish(Whole(model.state_dict()), version)
            seconds.append(time.perf_counter() - started)
            torch.cuda.empty_cache()
            gpu.append(used_gib())
            host.append(resident_gib(server.pid) + resident_gib_of_this_process())
        worst = mismatch(sampler, model, 20)
    figure(
        f"a publish takes {sorted(seconds)[10]:.2f} s (the first {seconds[0]:.2f}); from the 3rd to the 20th the GPU "
        f"grew by {gpu[-1] - gpu[2]:+.3f} GiB, both processes by {host[-1] - host[2]:+.3f} GiB; "
        f"largest |Δ log-prob| {worst:.2f} in bf16"
    )
    assert worst < 0.5, "another version's weights differ by nats"
    assert abs(gpu[-1] - gpu[2]) < 0.1 and host[-1] - host[2] < 0.2


def resident_gib_of_this_process():
    import psutil

    return psutil.Process().memory_info().rss / 2**30


def test_g7_tensors_are_complete_when_vllm_packs_them(figure):
    """vLLM packs on streams of its own, which wait for none of ours; a gather is slow here."""
    shape, count = (1024, 1024), 8

    class Group:
        def __init__(self) -> None:
            self.chunks: list[torch.Tensor] = []

        def broadcast(self, tensor: torch.Tensor, src: int) -> None:
            self.chunks.append(tensor.clone())  # on vLLM's stream, as NCCL would read it

    def part(number: int) -> Part:
        def gather(tensors):
            torch.cuda._sleep(100_000_000)  # about 50 ms
            return {name: tensor + number for name, tensor in tensors.items()}

        name = f"tensor {number}"
        return Part({name: base}, {name: base.dtype}, gather)

    def careless() -> Iterator[tuple[str, torch.Tensor]]:
        for one in parts:
            with torch.cuda.stream(home):
                made = one.convert(one.gathered())
            yield from made.items()

    def wrong(pairs: Iterator[tuple[str, torch.Tensor]]) -> int:
        group = Group()
        packed_nccl_broadcast_producer(pairs, group, 0, lambda item: item[1], buffer_size_bytes=base.nbytes)
        torch.cuda.synchronize()
        arrived = torch.cat(group.chunks).view(torch.float32).view(count, *shape)
        return sum(not bool((arrived[i] == i + 1).all()) for i in range(count))

    home = torch.cuda.current_stream()
    base = torch.zeros(shape, device="cuda")
    parts = [part(number) for number in range(1, count + 1)]
    wrong(careless())  # torch now has all the memory: allocating it waits for the device
    without, ours = wrong(careless()), wrong(iter(Weights(parts)))
    figure(f"of {count} tensors {ours} were incomplete, and {without} without our synchronisation")
    assert ours == 0
