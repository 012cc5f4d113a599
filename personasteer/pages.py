"""Pages and cards from the templates that lie beside the modules that fill them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

import jinja2


def load_template(
    package: str, name: str, filters: Mapping[str, Callable[..., Any]], *, autoescape: bool = True, **more: Any
) -> jinja2.Template:
    """A template of a package, with its filters; templates beside it can be included. What is not given is an error."""
    loader = jinja2.FunctionLoader(lambda asked: files(package).joinpath(asked).read_text("utf-8"))
    environment = jinja2.Environment(
        loader=loader, autoescape=autoescape, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        **more,
    )  # fmt: skip
    environment.filters |= filters
    return environment.get_template(name)
