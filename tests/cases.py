"""The number of cases that a fuzz test draws."""

from hypothesis import settings


def cases(short: int, whole: int) -> settings:
    """`short` of them in `make test`, the same ones each time; `whole` in `make soak`, others each time."""
    return settings(max_examples=whole if settings.get_current_profile_name() == "soak" else short)
