"""Derive, apply and ship persona vectors for quantized GGUF models, inside llama.cpp's compute graph."""

from personasteer._native import load_core as _load_core

_load_core()

from personasteer.attach import Attachment, attach, detach  # noqa: E402
from personasteer.chat import ChatTemplate  # noqa: E402
from personasteer.derive import contrast, derive  # noqa: E402
from personasteer.discover import diff  # noqa: E402
from personasteer.errors import (  # noqa: E402
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
from personasteer.live import Answer, Session, Stream  # noqa: E402
from personasteer.model import Model, demo_model  # noqa: E402
from personasteer.recalibrate import Recipe, finetune, realign  # noqa: E402
from personasteer.screen import screen  # noqa: E402
from personasteer.ship.bundle import Bundle, load_bundle  # noqa: E402
from personasteer.steering import Ablate, Add, Cap, Floor, Redirect, Steering, When  # noqa: E402
from personasteer.traits import Trait  # noqa: E402
from personasteer.vectors import PersonaVector  # noqa: E402

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
