"""Files that other people's runtimes load."""

from personasteer.ship.control_vector import load_control_vector, save_control_vector, scaled_directions

__all__ = ["load_control_vector", "save_control_vector", "scaled_directions"]
