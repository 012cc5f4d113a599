"""Every error that personasteer raises on purpose.

PersonasteerError
├── ArgumentError          an argument outside what the function takes (also a ValueError)
├── ModelError             a model file cannot be read, loaded, steered or computed
│   ├── ContextError       a request does not fit: empty, or longer than n_ctx
│   └── TemplateError      the chat template is missing, broken, or lacks a role that is needed
├── VectorError            a vector or a vector file is unusable
│   └── IncompatibleVector it belongs to a model of another shape
├── TraitError             a trait is unknown or its file breaks the rules
├── BundleError            a bundle is incomplete, changed, for another model, or breaks the rules
├── EndpointError          a server cannot be reached, or answers with an error or with something else
├── RegistryError          the registry of models cannot be opened, read or written, or lacks what was asked for
└── ElicitationError       the model did not show the trait, so no vector can be certified
"""

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager


class PersonasteerError(Exception):
    """Base of all errors raised on purpose; its text is one line for the user, whatever a file that it quotes holds."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(_one_line(a) if isinstance(a, str) else a for a in args))


def _one_line(text: str) -> str:
    """Line ends are spaces, and so is what a terminal would obey."""
    if text.isprintable():
        return text
    return "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text).rstrip()


class ArgumentError(PersonasteerError, ValueError):
    """An argument outside what the function takes."""


class ModelError(PersonasteerError):
    """A model file cannot be read, loaded, steered or computed."""


class ContextError(ModelError):
    """A request does not fit: empty, or longer than n_ctx."""


class TemplateError(ModelError):
    """The chat template is missing, broken, or lacks a role that is needed."""


class VectorError(PersonasteerError):
    """A vector or a vector file is unusable."""


class IncompatibleVector(VectorError):  # noqa: N818 (the name is part of the public surface)
    """A vector belongs to a model of another shape."""


class TraitError(PersonasteerError):
    """A trait is unknown or its file breaks the rules."""


class BundleError(PersonasteerError):
    """A bundle is incomplete, changed, for another model, or breaks the rules."""


class EndpointError(PersonasteerError):
    """A server cannot be reached, or answers with an error or with something else."""


class RegistryError(PersonasteerError):
    """The registry of models cannot be opened, read or written, or lacks what was asked for."""


class ElicitationError(PersonasteerError):
    """The model did not show the trait, so no vector can be certified."""


@contextmanager
def advising(what_helps: str) -> Iterator[None]:
    """An ElicitationError from inside also says what to do, which only the caller knows."""
    try:
        yield
    except ElicitationError as e:
        raise ElicitationError(f"{e}; {what_helps}") from e
