"""Derive, apply and ship persona vectors for quantized GGUF models, inside llama.cpp's compute graph.

A public name is loaded when it is first used: what needs no model (help, completion) starts at once.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from personasteer.errors import (
    ArgumentError,
    BundleError,
    ContextError,
    ElicitationError,
    EndpointError,
    IncompatibleVector,
    ModelError,
    PersonasteerError,
    RegistryError,
    TemplateError,
    TraitError,
    VectorError,
)

if TYPE_CHECKING:
    from personasteer.attach import Attachment, attach, detach
    from personasteer.chat import ChatTemplate
    from personasteer.derive import derive
    from personasteer.derive.contrast import contrast
    from personasteer.discover import diff
    from personasteer.live import Answer, Session, Stream
    from personasteer.model import Model, demo_model
    from personasteer.recalibrate import Recipe, finetune, realign
    from personasteer.screen import screen
    from personasteer.ship.bundle import Bundle, load_bundle
    from personasteer.steering import Ablate, Add, Cap, Floor, Redirect, Steering, When
    from personasteer.traits import Trait
    from personasteer.vectors import PersonaVector

__version__ = "0.1.0"

__all__ = [
    "Ablate",
    "Add",
    "Answer",
    "ArgumentError",
    "Attachment",
    "Bundle",
    "BundleError",
    "Cap",
    "ChatTemplate",
    "ContextError",
    "ElicitationError",
    "EndpointError",
    "Floor",
    "IncompatibleVector",
    "Model",
    "ModelError",
    "PersonaVector",
    "PersonasteerError",
    "Recipe",
    "Redirect",
    "RegistryError",
    "Session",
    "Steering",
    "Stream",
    "TemplateError",
    "Trait",
    "TraitError",
    "VectorError",
    "When",
    "attach",
    "contrast",
    "demo_model",
    "derive",
    "detach",
    "diff",
    "finetune",
    "load_bundle",
    "realign",
    "screen",
]

_HOMES = {  # which module a name is loaded from
    "attach": ("Attachment", "attach", "detach"),
    "chat": ("ChatTemplate",),
    "derive": ("contrast", "derive"),
    "discover": ("diff",),
    "live": ("Answer", "Session", "Stream"),
    "model": ("Model", "demo_model"),
    "recalibrate": ("Recipe", "finetune", "realign"),
    "screen": ("screen",),
    "ship.bundle": ("Bundle", "load_bundle"),
    "steering": ("Ablate", "Add", "Cap", "Floor", "Redirect", "Steering", "When"),
    "traits": ("Trait",),
    "vectors": ("PersonaVector",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


class _Package(ModuleType):
    """Where a function is called like its module, the name is the function's, whoever imports the module."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

if not TYPE_CHECKING:

    def __getattr__(name):
        if name == "_core":
            value = import_module("personasteer._native").load_core()  # after llama_cpp, or there are two libllamas
        elif name in _HOME:
            value = getattr(import_module(f"personasteer.{_HOME[name]}"), name)
        else:
            try:
                return import_module(f"personasteer.{name}")
            except ModuleNotFoundError as e:
                if e.name != f"personasteer.{name}":
                    raise
                raise AttributeError(f"module 'personasteer' has no attribute {name!r}") from None
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
