"""The section of a class from outside the package: its `Options`, with the name that the configuration calls it by."""

from __future__ import annotations

from typing import Any, Literal, TypeVar, cast

from pydantic import Field, create_model

from rlkd.config.sections.base import Section

Options = TypeVar("Options", bound=Section)


def own_options(found: Any, base: type[Options], tag: str, name: str) -> type[Options]:
    """A subclass of `found.Options` whose key `tag` has the value `name`.

    Raises: ValueError, one line, unless Options is a subclass of `base`.
    """
    options = getattr(found, "Options", None)
    if not (isinstance(options, type) and issubclass(options, base)):
        raise ValueError(
            f"{found.__name__} has no Options; define Options as a subclass of rlkd.config.{base.__name__}"
        )
    field: Any = (Literal[name], Field(description=name))
    own = create_model(options.__name__, __base__=options, __doc__=options.__doc__, **{tag: field})
    return cast("type[Options]", own)
