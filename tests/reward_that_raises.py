"""A user's reward functions that fail."""


def on_every_completion(completion: str, *, answer: str | None, prompt: str, meta: dict) -> float:
    raise OSError("no disk")


def on_long_completions(completion: str, *, answer: str | None, prompt: str, meta: dict) -> float:
    if len(completion) > len(answer or ""):
        raise OSError("too long for me")
    return float(completion == answer)
