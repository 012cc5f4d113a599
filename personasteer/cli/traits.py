from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from personasteer.cli._common import JsonOption, print_json, say
from personasteer.cli._completion import trait_names


def register(app: typer.Typer) -> None:
    app.command("traits")(traits)


def traits(
    name: Annotated[
        str | None, typer.Argument(help="A trait, or a .toml file, to show whole.", autocompletion=trait_names)
    ] = None,
    toml: Annotated[bool, typer.Option("--toml", help="As a .toml file, to start your own from.")] = False,
    json: JsonOption = False,
) -> None:
    """List the trait library, or show one trait.

    Example: `personasteer traits pessimistic`
    """
    from personasteer import traits as library
    from personasteer.traits.formats import as_toml

    if name is None:
        found = [library.get(n) for n in library.names()]
        if json:
            print_json([{"name": t.name, "description": t.description} for t in found])
            return
        width = max(len(t.name) for t in found)
        for t in found:
            say(f"{t.name:<{width}}  {t.description}")
        return
    trait = library.find(name)
    if toml:
        typer.echo(as_toml(trait), nl=False)
        return
    if json:
        print_json(asdict(trait))
        return
    say(f"{trait.name}: {trait.description}")
    for positive, negative in trait.system:
        say(f"\n+ {positive}\n- {negative}")
    say("\nderived on:\n  " + "\n  ".join(trait.derive_questions))
    say("held out:\n  " + "\n  ".join(trait.evaluate_questions))
    say(f"{len(trait.continuations)} continuation pairs, such as")
    for a, b in trait.continuations[:3]:
        say(f"  + {a}\n  - {b}")
