"""What a message must say, whatever its words: keys, names and numbers, in one line."""

import re


def one_line(*parts: object) -> str:
    """A pattern for `re.search` and `pytest.raises(match=…)`: one line that has all `parts`, in any order.

    A part that begins or ends with a digit is a number of its own: 4 is not found in 48. A compiled part is a pattern.
    """
    return "^" + "".join(f"(?=.*{_pattern(part)})" for part in parts) + r"[^\n]*\Z"


def assert_lines(found: list[str], *wanted: tuple[object, ...]) -> None:
    """One line for each of `wanted`, in that order: it begins with the first part, and has all others."""
    assert len(found) == len(wanted), found
    for line, (start, *parts) in zip(found, wanted, strict=True):
        assert line.startswith(str(start)), (line, start)
        for part in parts:
            assert re.search(one_line(part), line), (line, part)


def _pattern(part: object) -> str:
    if isinstance(part, re.Pattern):
        return part.pattern
    text = str(part)
    before, after = (r"(?<!\d)" if text[:1].isdigit() else "", r"(?!\d)" if text[-1:].isdigit() else "")
    return f"{before}{re.escape(text)}{after}"
