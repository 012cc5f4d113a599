"""Files that other people's runtimes load, and the proof that they do."""

from personasteer.ship.ablate import ablate_weights
from personasteer.ship.autoencoders import load_dictionary, load_sae_direction
from personasteer.ship.bake import bake
from personasteer.ship.bundle import Bundle, load_bundle, write_bundle
from personasteer.ship.control_vector import load_control_vector, save_control_vector, scaled_directions
from personasteer.ship.directions import directions_to_remove
from personasteer.ship.hub import push_bundle
from personasteer.ship.imports import import_vector, load_safetensors_directions
from personasteer.ship.lora import save_lora
from personasteer.ship.projection import Projection, load_projection, save_projection
from personasteer.ship.verify import Verification, verify

__all__ = [
    "Bundle",
    "Projection",
    "Verification",
    "ablate_weights",
    "bake",
    "directions_to_remove",
    "import_vector",
    "load_bundle",
    "load_control_vector",
    "load_dictionary",
    "load_projection",
    "load_sae_direction",
    "load_safetensors_directions",
    "push_bundle",
    "save_control_vector",
    "save_lora",
    "save_projection",
    "scaled_directions",
    "verify",
    "write_bundle",
]
