"""A frozen Hugging Face model in this process: the teacher, or the student's own start as a reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from transformers import PreTrainedModel

from rlkd.distributed import local_device
from rlkd.policy_head import token_logprobs
from rlkd.student import load_causal_lm
from rlkd.types import TeacherScores


class LocalScorer:
    """Scores in batches of similar length. See `Teacher` for the protocol.

    Every rank holds a whole copy; a model too large for that belongs behind a server.
    """

    def __init__(
        self,
        path: str,
        *,
        temperature: float,
        batch_tokens: int,
        dtype: torch.dtype,
        accelerator: Literal["auto", "cpu", "gpu"],
        attention: str | None,
        trust_remote_code: bool,
    ):
        self.path = path
        self.temperature = temperature
        self.batch_tokens = batch_tokens
        self.dtype = dtype
        self.accelerator = accelerator
        self.attention = attention
        self.trust_remote_code = trust_remote_code
        self._hf: PreTrainedModel | None = None

    def start(self) -> None:
        pass

    def open(self) -> None:
        hf = load_causal_lm(self.path, self.dtype, attention=self.attention, trust_remote_code=self.trust_remote_code)
        torch.nn.Module.to(hf, local_device(self.accelerator))
        self._hf = hf.eval().requires_grad_(False)

    def close(self) -> None:
        self._hf = None

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[TeacherScores]:
        hf = self._hf
        assert hf is not None, "open() comes first"
        lengths = [len(prompt) + len(completion) for prompt, completion in pairs]
        order = sorted(range(len(pairs)), key=lambda i: -lengths[i])
        scores: list[TeacherScores | None] = [None] * len(pairs)
        while order:
            rows = max(1, self.batch_tokens // lengths[order[0]])
            part, order = order[:rows], order[rows:]
            ids = torch.zeros(len(part), lengths[part[0]], dtype=torch.int64)
            for row, i in enumerate(part):
                ids[row, : lengths[i]] = torch.tensor([*pairs[i][0], *pairs[i][1]])
            ids = ids.to(hf.device)
            hidden = hf.base_model(input_ids=ids, use_cache=False).last_hidden_state
            logprobs, _ = token_logprobs(
                hidden, hf.get_output_embeddings(), ids, temperature=self.temperature, config=hf.config
            )
            for row, i in enumerate(part):
                scores[i] = TeacherScores(logprobs=tuple(logprobs[row, len(pairs[i][0]) : lengths[i]].tolist()))
        return [score for score in scores if score is not None]
