"""The in-process sampler: an unsharded copy of the student, which is sent new weights like a server."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rlkd import distributed
from rlkd.config.schema import Config
from rlkd.distributed import RunStopped, compute_dtype, local_device
from rlkd.generation.row_cache import holds_rows, keep, spread
from rlkd.generation.sampler import Sampling
from rlkd.losses.lm_head import OutputLayer, shaped
from rlkd.models.logprob_head import token_logprobs
from rlkd.models.output_check import BOUND
from rlkd.models.student import load_causal_lm
from rlkd.models.vocabulary import vocabulary_size
from rlkd.models.weights import Published, copy_into
from rlkd.types import Completion, Prompt, Rollout, VersionSpan

T = TypeVar("T")

DRAW_LOGITS = 2**21
"""Logits from which tokens are drawn at a time, 16 MiB in float64: new memory for more costs a CPU more time.
With a vocabulary of 151,936, the tokens of 32 rows are drawn in a third of the time."""


class HFSampler:
    """Samples with transformers. See `Sampler` for the protocol.

    Each token is drawn from the float64 CDF with one float64 uniform per (seed, iteration, prompt, sample, position),
    so a sample does not depend on which other rows are in the batch.
    """

    in_process = True

    def __init__(self, config: Config, eos_ids: Sequence[int]):
        self.config = config
        self.eos_ids = tuple(eos_ids)
        self.vocabulary = vocabulary_size(config.model)
        self.version: int | None = None
        self._hf: PreTrainedModel | None = None

    def start(self) -> None:
        """Nothing to start."""

    def open(self) -> None:
        """Load the student and check that `decode` samples correctly from it. Raises: RunStopped."""
        model = self.config.model
        trainer = self.config.trainer
        hf = load_causal_lm(
            model.path,
            compute_dtype(trainer.precision, trainer.accelerator),
            attention=model.attention,
            trust_remote_code=model.trust_remote_code,
            device=local_device(trainer.accelerator),
        )
        self._hf = hf.eval()
        check_decode(hf, model.path)

    def publish(self, student: Published, version: int) -> None:
        """See `Sampler.publish`.

        On one rank, where nothing is sampled while the student trains, the model takes over the student's own
        tensors, so that they are in memory once. Otherwise it gets a copy.
        """
        weights = student.weights()
        dtypes = {name: value.dtype for name, value in self._model.state_dict().items()}
        same_dtypes = dtypes == {info.name: info.dtype for info in weights.infos}
        if distributed.world_size() == 1 and self.config.rollout.max_staleness == 0 and same_dtypes:
            self._model.load_state_dict(dict(weights), strict=True, assign=True)
        else:
            copy_into(self._model, weights)
        self.version = version

    def sleep(self) -> None:
        """Nothing sleeps: the model is in the trainer's memory."""

    def keep_loaded(self) -> None:
        """See `Sampler.keep_loaded`."""
        self.version = 0

    def recover(self) -> None:
        """Never called, since there is no server to lose."""
        raise AssertionError("the in-process sampler has no servers to recover")

    def close(self) -> None:
        """Free the model."""
        self._hf = None

    @property
    def _model(self) -> PreTrainedModel:
        assert self._hf is not None, "call open() first"
        return self._hf

    def sample(self, prompts: Sequence[Prompt], *, n: int, iteration: int, sampling: Sampling) -> list[list[Rollout]]:
        """See `Sampler.sample`."""
        return _in_order(self.groups(prompts, n=n, iteration=iteration, sampling=sampling))

    def groups(
        self, prompts: Sequence[Prompt], *, n: int, iteration: int, sampling: Sampling
    ) -> Iterator[tuple[int, list[Rollout]]]:
        """The lists of `sample` with their indices, each as soon as its last completion has ended."""
        assert self.version is not None, "call publish() before sample()"
        rows = [(index, i) for index in range(len(prompts)) for i in range(n)]
        groups: list[dict[int, Rollout]] = [{} for _ in prompts]
        for start in range(0, len(rows), self.config.rollout.batch_rows):
            part = rows[start : start + self.config.rollout.batch_rows]
            noise = np.stack([uniform(sampling, iteration, prompts[index].id, i) for index, i in part])
            ids = [prompts[index].token_ids for index, _ in part]
            completions = decode_each(
                self._model,
                self.vocabulary,
                ids,
                noise,
                sampling.temperature,
                self.eos_ids,
                sampling.top_k,
                self.config.model.fp32_head,
            )
            for row, completion in completions:
                index, i = part[row]
                groups[index][i] = self._rollout(prompts[index], completion)
                if len(groups[index]) == n:
                    yield index, [groups[index][i] for i in range(n)]

    def _rollout(self, prompt: Prompt, completion: Completion) -> Rollout:
        assert self.version is not None
        return Rollout(
            prompt=prompt,
            token_ids=completion.token_ids,
            logprobs=completion.logprobs,
            weight_versions=(VersionSpan(start=0, end=len(completion.token_ids), version=self.version),),
            finish_reason=completion.finish_reason,
            top_ids=completion.top_ids,
        )


def decode(
    hf: PreTrainedModel,
    vocabulary: int,
    prompts: Sequence[Sequence[int]],
    uniforms: np.ndarray,
    temperature: float,
    ends: Sequence[int],
    top_k: int = 0,
    fp32_head: bool = False,
) -> list[Completion]:
    """The completions of `decode_each`, in the order of the prompts."""
    return _in_order(decode_each(hf, vocabulary, prompts, uniforms, temperature, ends, top_k, fp32_head))


@torch.no_grad()
def decode_each(
    hf: PreTrainedModel,
    vocabulary: int,
    prompts: Sequence[Sequence[int]],
    uniforms: np.ndarray,
    temperature: float,
    ends: Sequence[int],
    top_k: int = 0,
    fp32_head: bool = False,
) -> Iterator[tuple[int, Completion]]:
    """Generate completions of all prompts together, and give each with the index of its prompt once it has ended.

    If the cache allows it, a prompt that occurs several times is read once, and finished rows leave the batch.

    Args:
        vocabulary: only ids below it are drawn (vocabulary.py).
        uniforms: [rows, max tokens] float64 in [0, 1), the noise of every token.
        temperature: 0 is greedy.
        ends: token ids that end a completion.
        top_k: how many of the most likely tokens to return at each position.
        fp32_head: see `OutputLayer.fp32`.
    """
    device, longest = hf.device, uniforms.shape[1]
    layer = OutputLayer.of(hf, vocabulary, fp32_head)
    cache = DynamicCache(config=hf.config)
    by_row = holds_rows(cache)
    distinct, copies = _distinct(prompts) if by_row else (prompts, range(len(prompts)))
    input_ids, mask = _left_padded(distinct, device)
    columns = mask.shape[1]
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    rows = torch.tensor(copies, device=device)  # of the prompts; afterwards, rows of the result
    is_end = torch.zeros(vocabulary, dtype=torch.bool, device=device)
    is_end[[end for end in ends if end < vocabulary]] = True
    drawn = _Drawn(len(prompts))
    for position in range(longest):
        hidden = _states(hf, input_ids, mask[:, : columns + position], position_ids, cache)
        raw = layer.sampled_from(hidden)
        if position == 0:
            raw, mask, position_ids = raw[rows], mask[rows], position_ids[rows, -1:]
            mask = torch.nn.functional.pad(mask, (0, longest), value=1)  # with all tokens to come
            if by_row:
                spread(cache, rows, longest - 1)
        noise = torch.as_tensor(uniforms[drawn.alive, position], device=device)
        tokens, logprobs, likeliest = _draw_from(raw, layer, noise, temperature, top_k)
        ended = is_end[tokens].cpu().numpy()
        for row in drawn.add(tokens, logprobs, likeliest, ended):
            yield row, drawn.completion(row)
        if drawn.stopped.all():
            break
        position_ids = position_ids + 1
        if by_row and ended.any():
            kept = torch.as_tensor(drawn.leave(ended), device=device)
            keep(cache, kept)
            tokens, mask, position_ids = tokens[kept], mask[kept], position_ids[kept]
        input_ids = tokens[:, None]
    for row in np.flatnonzero(~drawn.stopped).tolist():
        yield row, drawn.completion(row)


def _in_order(found: Iterable[tuple[int, T]]) -> list[T]:
    """What comes with its index, in the order of the indices."""
    return [one for _, one in sorted(found, key=itemgetter(0))]


def _draw_from(
    raw: Tensor, layer: OutputLayer, uniforms: Tensor, temperature: float, top_k: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`draw` from the raw logits [B, V] of an output layer, for a part of the rows at a time, and the ids [B, K] of the
    likeliest tokens, if there are to be any."""
    rows = max(1, DRAW_LOGITS // raw.shape[-1])
    tokens, logprobs, likeliest = [], [], []
    for part, noise in zip(raw.split(rows), uniforms.split(rows), strict=True):
        logits = shaped(part, layer.scale, layer.softcap, torch.float64)
        drawn = draw(logits, noise, temperature)
        tokens.append(drawn[0])
        logprobs.append(drawn[1])
        if top_k:
            likeliest.append(logits.topk(min(top_k, logits.shape[-1])).indices)
    return torch.cat(tokens), torch.cat(logprobs), torch.cat(likeliest) if top_k else None


def _states(hf: PreTrainedModel, input_ids: Tensor, mask: Tensor, position_ids: Tensor, cache: DynamicCache) -> Tensor:
    """Read the tokens [B, T]. Returns: the last hidden states, [B, H].

    Args:
        mask: [B, T′], of all tokens so far, these included.
        position_ids: [B, T].
    """
    trunk = hf.base_model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
    )
    states: Tensor = trunk.last_hidden_state
    return states[:, -1]


class _Drawn:
    """What has been drawn for each completion, by rows of a batch whose order changes when rows leave."""

    def __init__(self, rows: int):
        self.alive = np.arange(rows)
        """The index of the completion that each row of the batch is."""
        self.stopped = np.zeros(rows, dtype=bool)
        """Whether each completion has ended."""
        self._tokens: list[list[int]] = [[] for _ in range(rows)]
        self._logprobs: list[list[float]] = [[] for _ in range(rows)]
        self._likeliest: list[list[Tensor]] = [[] for _ in range(rows)]

    def add(self, tokens: Tensor, logprobs: Tensor, likeliest: Tensor | None, ended: np.ndarray) -> list[int]:
        """Add a token to each completion that has not ended. Returns: the completions that end with it.

        Args:
            tokens, logprobs, ended: [B].
            likeliest: [B, K] ids.
        """
        rows, goes_on = self.alive.tolist(), (~self.stopped[self.alive]).tolist()
        tops = likeliest.cpu().unbind() if likeliest is not None else [None] * len(rows)
        for row, unfinished, token, logprob, top in zip(
            rows, goes_on, tokens.tolist(), logprobs.tolist(), tops, strict=True
        ):
            if unfinished:  # others are there only where rows cannot leave the batch
                self._tokens[row].append(token)
                self._logprobs[row].append(logprob)
                if top is not None:
                    self._likeliest[row].append(top)
        ending = self.alive[ended & np.array(goes_on)]
        self.stopped[ending] = True
        return list(ending.tolist())

    def leave(self, ended: np.ndarray) -> np.ndarray:
        """Remove the rows that have ended ([B]), whose places the last ones take. Returns: the rows now, in order."""
        left = len(ended) - int(ended.sum())
        kept = np.arange(left)
        kept[ended[:left]] = left + np.flatnonzero(~ended[left:])
        self.alive = self.alive[kept]
        return kept

    def completion(self, row: int) -> Completion:
        """What there is of one completion."""
        return Completion(
            token_ids=tuple(self._tokens[row]),
            logprobs=tuple(self._logprobs[row]),
            finish_reason="stop" if self.stopped[row] else "length",
            top_ids=torch.stack(self._likeliest[row]) if self._likeliest[row] else None,
        )


def _distinct(prompts: Sequence[Sequence[int]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The prompts without repetitions, and the index among them of each given prompt."""
    found: dict[tuple[int, ...], int] = {}
    copies = [found.setdefault(tuple(prompt), len(found)) for prompt in prompts]
    return list(found), copies


_CHECK_LENGTHS = (9, 2, 5, 2)
"""Lengths of the prompts in `check_decode`; three are padded, and the last is the second one again."""
_HALF_BOUND = 0.2
"""Largest allowed mean difference, in nats, between log-probs with and without a cache in half precision.

Rounding alone gave up to 0.013 in tiny models; padding that is treated as tokens gives more than 1. Differences in
between are left to `rollout.max_mismatch`.
"""


@torch.no_grad()
def check_decode(hf: PreTrainedModel, path: str) -> None:
    """Sample a few tokens for prompts of unequal length, whose rows end at different times, and compare the log-probs
    with those of a forward pass over prompt and completion without a cache, which is what the trainer computes.

    This finds model families whose cache, positions or mask need something that `decode` does not do.

    Args:
        path: the model's path, for the error message.

    Raises: RunStopped, one line that suggests vLLM, if the log-probs differ or `decode` fails.
    """

    def refuse(why: str) -> RunStopped:
        return RunStopped(
            f"{path}: rlkd cannot sample from {type(hf).__name__} in process: {' '.join(why.split())[:300]}; use vLLM "
            "(rollout.backend: vllm; for a teacher, teacher.backend: served)"
        )

    vocabulary = hf.get_output_embeddings().weight.shape[0]
    prompts = [[(7 * length + 3 * t + 1) % vocabulary for t in range(length)] for length in _CHECK_LENGTHS]
    noise = np.random.Generator(np.random.Philox(0)).random((len(prompts), 6))
    try:
        straight = decode(hf, vocabulary, prompts, noise, 1.0, ends=())
        completions = decode(hf, vocabulary, prompts, noise, 1.0, ends=straight[0].token_ids[1:2])
    except Exception as error:  # an unknown cache can raise any type; report it to the user
        raise refuse(f"{type(error).__name__}: {error}") from error
    gaps = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([[*prompt, *completion.token_ids]], device=hf.device)
        hidden = hf.base_model(input_ids=ids, use_cache=False).last_hidden_state
        plain, _ = token_logprobs(hidden, hf.get_output_embeddings(), ids, temperature=1.0, config=hf.config)
        gaps += (plain[0, len(prompt) :].double().cpu() - torch.tensor(completion.logprobs).double()).abs().tolist()
    exact = hf.dtype == torch.float32
    gap, bound = (max(gaps), BOUND) if exact else (sum(gaps) / len(gaps), _HALF_BOUND)
    if not gap <= bound:
        raise refuse(
            f"the log-probs of sampled tokens with and without a cache differ by {gap:.2g} nats "
            f"{'at most' if exact else 'on average'}; {bound:.2g} are allowed"
        )


def draw(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling.

    Args:
        logits: [B, V] float64.
        uniforms: [B] float64 in [0, 1).
        temperature: 0 is greedy; the log-probs are then those of temperature 1.

    Returns: (tokens [B], log-probs [B] at the temperature).
    """
    scaled = logits if temperature in (0, 1) else logits / temperature
    highest = scaled.amax(dim=-1, keepdim=True)
    cdf = (scaled - highest).exp_().cumsum_(dim=-1)
    # The last entry is the sum of all: scale the draw with it, so that it is always inside the CDF.
    total = cdf[:, -1:]
    if temperature == 0:
        tokens = logits.argmax(dim=-1, keepdim=True)
    else:
        tokens = torch.searchsorted(cdf, uniforms[:, None] * total, right=True).clamp(max=logits.shape[-1] - 1)
    # The log-softmax, at the tokens only.
    logprobs = scaled.gather(1, tokens) - highest - total.log()
    return tokens.squeeze(1), logprobs.squeeze(1)


def uniform(sampling: Sampling, iteration: int, prompt_id: str, sample: int) -> np.ndarray:
    """The noise of one completion: [max_tokens] float64 in [0, 1), a function of the arguments only."""
    name = hashlib.sha256(prompt_id.encode("utf-8", "surrogatepass")).digest()
    words = np.frombuffer(name[:8], dtype=np.uint32).tolist()
    key = np.random.SeedSequence([sampling.seed, iteration, sample, *words])
    return np.random.Generator(np.random.Philox(key)).random(sampling.max_tokens)


def _left_padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """([B, T] ids, [B, T] mask), padded so that the last token of every row is in the last column."""
    longest = max(len(s) for s in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask = torch.zeros(len(sequences), longest, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, longest - len(sequence) :] = torch.tensor(sequence)
        mask[row, longest - len(sequence) :] = 1
    return ids.to(device), mask.to(device)
