"""The section `teacher`, with one class per kind of teacher."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, SerializeAsAny, Tag, model_validator

from rlkd.config.own_options import own_options
from rlkd.config.sections.base import Section
from rlkd.config.sections.servers import ServerConfig
from rlkd.plugins import TEACHER, find, is_outside


class _Teacher(Section):
    temperature: float = Field(
        1.0, gt=0, description="temperature at which student and teacher are compared; a served teacher supports only 1"
    )
    check_parity: bool = Field(
        False, description="at the start, check that the teacher's scoring agrees with the trainer's"
    )


class TeacherConfig(_Teacher):
    """Options of a teacher of your own; its Options derive from this class."""

    backend: str = Field(description="the class of the teacher, as module:Class")


class NoTeacherConfig(Section):
    """No teacher."""

    backend: Literal["none"] = Field("none", description="none: no teacher")


class LocalTeacherConfig(_Teacher):
    """A frozen Hugging Face model in every trainer process."""

    backend: Literal["local"] = Field(description="local: a model in this process; served: a vLLM server; none")
    path: str = Field(description="folder or hub id of the teacher, or builtin:teacher, builtin:mentor")
    batch_tokens: int = Field(16384, ge=1, description="tokens, padding included, that the teacher scores at a time")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="compute type of the teacher")


class ServedTeacherConfig(_Teacher):
    """A frozen model behind a vLLM server."""

    backend: Literal["served"] = Field(description="local: a model in this process; served: a vLLM server; none")
    path: str = Field(description="folder or hub id of the teacher; its tokenizer is compared with the student's")
    url: str | None = Field(None, description="the running server, e.g. http://host:8001; excludes server.launch")
    urls: list[str] = Field([], description="several running servers of the same model; excludes url")
    server: ServerConfig = Field(ServerConfig(), description="how to start the server")

    @model_validator(mode="after")
    def _check(self) -> ServedTeacherConfig:
        if self.temperature != 1.0:
            raise ValueError(
                f"teacher.temperature is {self.temperature}, but a served teacher supports only 1; "
                "set it to 1 or use teacher.backend: local"
            )
        if (self.url is not None) + bool(self.urls) + self.server.launch != 1:
            raise ValueError(
                "set either teacher.url (a running server), teacher.urls (several) or teacher.server.launch: true "
                "(start one)"
            )
        return self

    @property
    def addresses(self) -> list[str]:
        """URLs of the running servers; empty if the server is launched."""
        return self.urls if self.url is None else [self.url]


class SelfTeacherConfig(_Teacher):
    """Self-distillation: the student itself, given a privileged prompt."""

    backend: Literal["self"] = Field(description="self: the student, under a privileged prompt")
    weights: Literal["fixed", "ema", "live"] = Field(
        "fixed",
        description="fixed: the student's initial weights; ema: a moving average of its weights; live: the weights "
        "that sampled",
    )
    decay: float = Field(0.999, ge=0, lt=1, description="ema: decay of the moving average per iteration")
    scorer: Literal["local", "policy_server"] = Field(
        "local",
        description="local: a copy in every trainer process; policy_server: the vLLM servers that sample rollouts",
    )
    batch_tokens: int = Field(16384, ge=1, description="tokens, padding included, that a local copy scores at a time")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="compute type of a local copy")

    @model_validator(mode="after")
    def _check(self) -> SelfTeacherConfig:
        if self.scorer == "policy_server" and self.weights == "ema":
            raise ValueError(
                "teacher.scorer is policy_server, but teacher.weights is ema: those servers do not have the "
                "averaged weights; set "
                "teacher.weights: live, or teacher.scorer: local"
            )
        if self.scorer == "policy_server" and self.temperature != 1.0:
            raise ValueError(
                f"teacher.temperature is {self.temperature}, but a server supports only 1; set it to 1 "
                "or use teacher.scorer: local"
            )
        return self


class NamedLocalTeacherConfig(LocalTeacherConfig):
    """One of several teachers, in every trainer process."""

    name: str = Field(description="this teacher is used for rows whose teacher.column has this value")


class NamedServedTeacherConfig(ServedTeacherConfig):
    """One of several teachers, behind a vLLM server."""

    name: str = Field(description="this teacher is used for rows whose teacher.column has this value")


class RoutedTeacherConfig(Section):
    """Several teachers; a column of the data selects the teacher of each prompt."""

    backend: Literal["routed"] = Field(description="routed: several teachers, selected by a column of the data")
    column: str = Field("teacher", description="column with the name of the prompt's teacher")
    teachers: list[Annotated[NamedLocalTeacherConfig | NamedServedTeacherConfig, Field(discriminator="backend")]] = (
        Field(min_length=1, description="the teachers, each with a name")
    )

    @property
    def temperature(self) -> float:
        return self.teachers[0].temperature

    @property
    def check_parity(self) -> bool:
        return False

    @model_validator(mode="after")
    def _check(self) -> RoutedTeacherConfig:
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) < len(names):
            raise ValueError(f"teacher.teachers: names must differ, got {', '.join(names)}")
        if len({teacher.temperature for teacher in self.teachers}) > 1:
            raise ValueError("teacher.teachers: expected the same temperature for all teachers")
        if any(isinstance(teacher, ServedTeacherConfig) and teacher.server.launch for teacher in self.teachers):
            raise ValueError(
                "teacher.teachers: server.launch is not supported with several teachers; start the servers and set url"
            )
        return self


def _backend(section: Any) -> str | None:
    """The tag of a `teacher` section: its backend, or `own` if the class of a user's teacher has validated it."""
    if isinstance(section, TeacherConfig):
        return "own"
    backend = section.get("backend") if isinstance(section, dict) else getattr(section, "backend", None)
    return None if backend is None else str(backend)


Teacher = Annotated[
    Annotated[NoTeacherConfig, Tag("none")]
    | Annotated[LocalTeacherConfig, Tag("local")]
    | Annotated[ServedTeacherConfig, Tag("served")]
    | Annotated[SelfTeacherConfig, Tag("self")]
    | Annotated[RoutedTeacherConfig, Tag("routed")]
    | Annotated[SerializeAsAny[TeacherConfig], Tag("own")],
    Discriminator(_backend),
]


def teacher_options(name: str) -> type[TeacherConfig] | None:
    """The section class of a teacher from outside the package; None if `name` does not stand for one.

    Raises: ValueError with a one-line message if the teacher cannot be imported.
    """
    built_in = ("none", "local", "served", "self", "routed")
    if name in built_in or not is_outside(name, TEACHER):
        return None
    return find(name, TEACHER, lambda found: own_options(found, TeacherConfig, "backend", name))
