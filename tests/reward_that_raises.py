"""A user's reward functions that fail."""


def on_every_completion(completion: str, *, answer: str | None, prompt: str, meta: dict) -> float:
    raise OSError("no disk")


def on_some_completions(completion: str, *, answer: str | None, prompt: str, meta: dict) -> float:
    if completion[:1] > "m":
        raise OSError("not in my half of the alphabet")
    return float(completion == answer)
