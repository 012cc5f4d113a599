from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from personasteer.cli._common import JsonOption, print_json, say, stages


def register(app: typer.Typer) -> None:
    app.command("push")(push)


def push(
    bundle: Annotated[Path, typer.Argument(help="A bundle: a folder or a .tar file.")],
    repo: Annotated[str, typer.Option("--repo", metavar="USER/NAME", help="Repository on the Hugging Face Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a repository that others do not see.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the bundle and show what would be sent; no network.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Check a bundle and upload it to the Hugging Face Hub, as the one that `hf auth login` or HF_TOKEN says you are.

    Example: `personasteer push optimist --repo USER/optimist --dry-run`
    """
    from personasteer.ship.hub import push_bundle

    with stages() as stage:
        done = push_bundle(bundle, repo, private=private, dry_run=dry_run, progress=stage("checking"))
    if json:
        print_json(done.summary())
        return
    lines = [f"{size:>14,}  {name}" for name, size in done.sizes.items()]
    lines.append(f"{sum(done.sizes.values()):>14,}  in all")
    if dry_run:
        visible = "private" if private else "public"
        lines = [f"would go to {done.url}, {visible} where it is new:", *lines, "front matter of its card:"]
        lines += [f"  {line}" for line in done.front_matter.splitlines()]
    else:
        lines.append(done.url)
    for line in lines:
        say(line)
