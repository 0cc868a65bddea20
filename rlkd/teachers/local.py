"""A frozen Hugging Face model in this process: a teacher, or the initial student as a reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel

from rlkd import distributed
from rlkd.distributed import local_device
from rlkd.generation.hf import check_decode, decode, uniform
from rlkd.generation.sampler import Sampling, eos_ids
from rlkd.losses.lm_head import OutputLayer
from rlkd.models.logprob_head import CHUNK_LOGITS, token_logprobs
from rlkd.models.student import load_causal_lm, load_frozen
from rlkd.teachers.lockstep import Lockstep
from rlkd.teachers.teacher import FixedTeacher, ScoreRequest, check_scorable
from rlkd.types import Completion, Signal, TeacherScores


class LocalScorer(FixedTeacher):
    """Scores in batches of similar length. See `Teacher` for the protocol.

    Every rank holds a full copy, or, with `lockstep`, a part of its layers. Serve a model that is too large for that.
    """

    in_process = True

    def __init__(
        self,
        path: str,
        *,
        vocabulary: int,
        temperature: float,
        batch_tokens: int,
        dtype: torch.dtype,
        accelerator: Literal["auto", "cpu", "gpu"],
        attention: str | None,
        trust_remote_code: bool,
        lockstep: Lockstep | None = None,
        fp32_head: bool = False,
    ):
        """
        Args:
            vocabulary: the number of tokens that student and teacher share (vocabulary.py); all scores are over them.
            temperature: used for all scores.
            batch_tokens: maximal number of tokens in one forward pass, including padding.
            lockstep: the model is sharded over the ranks, and scores in its turns. None: it is not.
            fp32_head: see `OutputLayer.fp32`.
        """
        self.path = path
        self.vocabulary = vocabulary
        self.temperature = temperature
        self.batch_tokens = batch_tokens
        self.dtype = dtype
        self.accelerator = accelerator
        self.attention = attention
        self.trust_remote_code = trust_remote_code
        self.lockstep = lockstep
        self._number = 0  # in `lockstep`
        self.fp32_head = fp32_head
        self._hf: PreTrainedModel | None = None
        self._writes = False  # whether check_decode has passed; it is not needed for scoring

    def open(self) -> None:
        """Load the model. With `lockstep`, a collective. Raises: RunStopped, see `load_causal_lm`."""
        device, trusted = local_device(self.accelerator), self.trust_remote_code
        if self.lockstep is not None and distributed.world_size() > 1:
            mesh = init_device_mesh(device.type, (distributed.world_size(),))
            hf = load_frozen(self.path, self.dtype, attention=self.attention, trust_remote_code=trusted, mesh=mesh)
        else:
            hf = load_causal_lm(
                self.path, self.dtype, attention=self.attention, trust_remote_code=trusted, device=device
            )
        if self.lockstep is not None:
            self._number = self.lockstep.add(self._filler)
        self._hf = hf.eval().requires_grad_(False)

    def close(self) -> None:
        """Free the model."""
        self._hf = None

    @property
    def hf(self) -> PreTrainedModel:
        """The loaded model."""
        assert self._hf is not None, "call open() first"
        return self._hf

    def layers(self) -> tuple[OutputLayer, ...]:
        """See `Teacher.layers`."""
        return (OutputLayer.of(self.hf, self.vocabulary, self.fp32_head),)

    @torch.no_grad()
    def score(self, questions: Sequence[ScoreRequest], signal: Signal) -> list[TeacherScores]:
        """See `Teacher.score`. Sorts by length, so that a forward pass has little padding.

        With `lockstep`, a collective: other ranks score at the same time, or take a turn without a request.
        """
        check_scorable(questions)
        lengths = [len(q.prompt) + len(q.completion) for q in questions]
        layer = OutputLayer.of(self.hf, self.vocabulary, self.fp32_head)
        order = sorted(range(len(questions)), key=lambda i: -lengths[i])
        scores: list[TeacherScores | None] = [None] * len(questions)

        def forward(part: Sequence[int]) -> None:
            ids = torch.zeros(len(part), lengths[part[0]], dtype=torch.int64)
            completions = torch.zeros_like(ids, dtype=torch.bool)
            for row, i in enumerate(part):
                ids[row, : lengths[i]] = torch.tensor([*questions[i].prompt, *questions[i].completion])
                completions[row, len(questions[i].prompt) : lengths[i]] = True
            ids, completions = ids.to(self.hf.device), completions.to(self.hf.device)
            hidden = self.hf.base_model(input_ids=ids, use_cache=False).last_hidden_state
            logprobs, _ = token_logprobs(
                hidden, layer, ids, temperature=self.temperature, config=self.hf.config, mask=completions
            )
            for row, i in enumerate(part):
                start, end = len(questions[i].prompt), lengths[i]
                # A token is predicted from the state of the token before it.
                states = hidden[row, start - 1 : end - 1]
                scores[i] = self._scores(logprobs[row, start:end], states, signal, questions[i].ids)

        forwards: list[Callable[[], None]] = []
        while order:
            rows = max(1, self.batch_tokens // lengths[order[0]])
            part, order = order[:rows], order[rows:]
            forwards.append(functools.partial(forward, part))
        if self.lockstep is not None:
            self.lockstep.turn(True, self._number, forwards)
        else:
            for act in forwards:
                act()
        return [score for score in scores if score is not None]

    @torch.no_grad()
    def _filler(self) -> None:
        """A forward without results."""
        self.hf.base_model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self.hf.device), use_cache=False)

    def write(self, questions: Sequence[ScoreRequest], sampling: Sampling, iteration: int) -> list[Completion]:
        """See `Teacher.write`. Raises: RunStopped if `decode` cannot sample from this model."""
        ends = eos_ids(self.path, self.trust_remote_code)
        if not self._writes:
            check_decode(self.hf, self.path)
            self._writes = True
        completions: list[Completion] = []
        longest = max((len(q.prompt) for q in questions), default=1) + sampling.max_tokens
        rows = max(1, self.batch_tokens // longest)
        for start in range(0, len(questions), rows):
            part = questions[start : start + rows]
            noise = np.stack([uniform(sampling, iteration, f"teacher/{q.name}", 0) for q in part])
            ids = [q.prompt for q in part]
            completions += decode(
                self.hf, self.vocabulary, ids, noise, sampling.temperature, ends, fp32_head=self.fp32_head
            )
        return completions

    def _scores(self, logprobs: Tensor, hidden: Tensor, signal: Signal, given: Tensor | None) -> TeacherScores:
        """The scores of one completion, from the log-probs [L] of its tokens, the hidden states [L, H] that predict
        them, and the given token ids [L, K], if any."""
        values = tuple(logprobs.tolist())
        if signal.tier == "sampled":
            return TeacherScores(logprobs=values)
        if signal.tier == "hidden":
            return TeacherScores(logprobs=values, hidden=hidden.to("cpu", copy=True))
        layer, vocabulary = OutputLayer.of(self.hf, self.vocabulary, self.fp32_head), self.vocabulary
        step = max(1, CHUNK_LOGITS // vocabulary)
        assert signal.tier != "given" or given is not None, "the question has no ids"
        ids, top_logprobs = [], []
        for start in range(0, len(hidden), step):
            scored = (layer.logits(hidden[start : start + step], vocabulary) / self.temperature).log_softmax(-1)
            if given is None or signal.tier == "top_k":
                best = scored.topk(min(signal.k, vocabulary))
                ids.append(best.indices)
                top_logprobs.append(best.values)
            else:
                requested = given[start : start + step].to(scored.device)
                absent = (requested < 0) | (requested >= vocabulary)  # −1: padding
                ids.append(requested.masked_fill(absent, -1))
                top_logprobs.append(scored.gather(-1, requested.masked_fill(absent, 0)).masked_fill(absent, -torch.inf))
        return TeacherScores(logprobs=values, top_ids=torch.cat(ids).cpu(), top_logprobs=torch.cat(top_logprobs).cpu())
