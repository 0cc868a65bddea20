"""Completions of given prompts, by a sampler that has loaded the model itself; nothing is trained or published."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlkd.config.schema import Config
from rlkd.data.chat import completion_text, load_tokenizer, read_as_configured
from rlkd.data.sources import load_source
from rlkd.distributed import RunStopped
from rlkd.generation.sampler import Sampling
from rlkd.pipeline.build import build_sampler
from rlkd.servers.client import ServerLost
from rlkd.types import Prompt, Rollout

_ANY_LENGTH = 2**31


def given_prompts(config: Config, texts: Sequence[str], path: str | None) -> list[Prompt]:
    """`texts` as user messages, or the prompts of the data at `path`, as the student of `config` reads them.

    Raises: ValueError, with a line for each fault.
    """
    # What is only compared with, or trained on, need not be there.
    columns = ("answer_column", "privileged_column", "completion_column", "rejected_column")
    data = config.data.model_copy(update={"max_prompt_tokens": _ANY_LENGTH, **dict.fromkeys(columns)})
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    if path is not None:
        return list(load_source(data, tokenizer, path))
    prompts = []
    for number, text in enumerate(texts):
        if not text.strip():
            raise ValueError(f"prompt {number}: expected a text, got an empty one")
        reading = read_as_configured(data, tokenizer, text, data.template_variables, data.system)
        ids, variables = reading.token_ids, data.template_variables
        prompts.append(Prompt(id=str(number), messages=reading.messages, token_ids=ids, variables=variables))
    return prompts


def for_prompts(config: Config, prompts: Sequence[Prompt]) -> Config:
    """`config` with the length of these prompts, for which a server is started."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    return config.model_copy(update={"data": config.data.model_copy(update={"max_prompt_tokens": longest})})


def completions(config: Config, prompts: Sequence[Prompt], samples: int, temperature: float) -> list[list[Rollout]]:
    """`samples` completions of each prompt, one list per prompt. They depend on `run.seed`.

    Raises: RunStopped, one line, if the model or its server cannot be used.
    """
    policy = build_sampler(config)
    sampling = Sampling(temperature=temperature, max_tokens=config.rollout.max_tokens, seed=config.run.seed)
    try:
        policy.start()
        policy.open()
        policy.keep_loaded()
        return policy.sample(prompts, n=samples, iteration=0, sampling=sampling)
    except ServerLost as error:
        raise RunStopped(str(error)) from error
    finally:
        policy.close()


def lines(config: Config, groups: Sequence[Sequence[Rollout]]) -> list[dict[str, Any]]:
    """What there is to tell of each completion. As rewards read it, the text has no end token, but special tokens."""
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    return [
        {
            "id": rollout.prompt.id,
            "sample": sample,
            "messages": list(rollout.prompt.messages),
            "completion": completion_text(tokenizer, rollout.token_ids, rollout.finish_reason),
            "finish_reason": rollout.finish_reason,
            "tokens": len(rollout.token_ids),
        }
        for group in groups
        for sample, rollout in enumerate(group)
    ]
