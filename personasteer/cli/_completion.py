"""What a shell offers for values: the names that the library knows. Where nothing is offered, it offers files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from personasteer import traits


def one_of(*values: str) -> Callable[[str], list[str]]:
    """Completes an option that takes one of these."""

    def completed(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return completed


def trait_names(incomplete: str) -> list[str]:
    """Completes a trait of the library; a trait may also be a file."""
    return one_of(*traits.names())(incomplete)


def domains(incomplete: str) -> list[str]:
    """Completes a domain of the benign samples."""
    from personasteer.conversations.benign import benign_domains

    return one_of(*benign_domains())(incomplete)


def complete_model(incomplete: str) -> list[str]:
    """Completes `demo`, unless there is a file that begins like it."""
    begun = incomplete and "demo".startswith(incomplete)
    return ["demo"] if begun and not any(Path().glob(incomplete + "*")) else []
