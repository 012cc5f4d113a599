"""Bundles to the Hugging Face Hub, through its own client (extra `hub`)."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personasteer.engine import Progress
from personasteer.errors import ArgumentError, BundleError
from personasteer.ship.archive import PERSONA, SUMS
from personasteer.ship.bundle import CARD, MODEL, MODELFILE, check_bundle

REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
# what older versions of a bundle may have left in its repository
OURS = (PERSONA, SUMS, CARD, MODEL, MODELFILE, "adapters/*", "vectors/*", "files/*", "reports/*")


@dataclass(frozen=True)
class Push:
    """What goes, or went, where. sizes: bytes by file; url: of the repository, or of the commit that was made."""

    repo: str
    url: str
    private: bool
    dry_run: bool
    sizes: Mapping[str, int]
    front_matter: str

    def summary(self) -> dict[str, Any]:
        """What `push --json` prints."""
        return {
            "repo": self.repo,
            "url": self.url,
            "private": self.private,
            "dry_run": self.dry_run,
            "files": [{"path": name, "size": size} for name, size in self.sizes.items()],
            "size": sum(self.sizes.values()),
            "front_matter": self.front_matter,
        }


def push_bundle(
    bundle: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Push:
    """Upload a bundle, a folder or a .tar file, as one commit to USER/NAME on the Hub, which is made where it is not
    there. Files of an older version of the bundle that the new one lacks are deleted.

    The token is the Hub client's own: HF_TOKEN, or what `hf auth login` stored.

    Args:
        private: make a repository that others do not see; one that is there stays as it is.
        dry_run: check the bundle and say what would be sent; uses neither the client nor the network.
        progress: of the check.

    Raises:
        ArgumentError: `repo` is not USER/NAME.
        BundleError: the bundle is damaged; huggingface-hub is not installed; the Hub refuses, or cannot be reached; the
            repository holds files that no bundle has.
    """
    if not REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise ArgumentError(f"{repo!r:.100} is no repository: USER/NAME is expected")
    api = None if dry_run else _client()
    source = Path(bundle)
    with ExitStack() as stack:
        folder = source
        if api is not None and not source.is_dir():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="personasteer-push-")))
        checked = check_bundle(source, into=None if folder == source else folder, progress=progress)
        url = f"https://huggingface.co/{repo}"
        if api is not None:
            try:
                url = _upload(api, folder, repo, private, list(checked.sizes), checked.persona.name)
            except BundleError:
                raise
            except Exception as e:  # whatever the client and its HTTP library raise
                raise BundleError(f"{repo}: {_said(e)}") from e
        return Push(repo, url, private, dry_run, checked.sizes, _front_matter(checked.card))


def _client() -> Any:
    try:
        from huggingface_hub import HfApi
    except ImportError as e:
        raise BundleError("huggingface-hub is not installed: pip install 'personasteer[hub]'") from e
    return HfApi(library_name="personasteer")


def _upload(api: Any, folder: Path, repo: str, private: bool, names: list[str], title: str) -> str:
    """The URL of the commit."""
    api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
    for name in api.list_repo_files(repo, repo_type="model"):
        first, _, rest = name.partition("/")
        if not (name.startswith(".") or name in OURS or (rest and f"{first}/*" in OURS)):
            raise BundleError(
                f"{repo}: holds {name!r:.80}, which is no file of a bundle, and would make the download one that does "
                "not load: choose another repository"
            )
    # names hold no character that is special in a pattern
    done = api.upload_folder(
        repo_id=repo, repo_type="model", folder_path=folder, allow_patterns=names, delete_patterns=list(OURS),
        commit_message=f"personasteer bundle: {title}",
    )  # fmt: skip
    return str(done.commit_url)


def _said(error: Exception) -> str:
    """The client's message as one line, without what looks like a token."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    hint = ""
    if status in (401, 403) or type(error).__name__ == "LocalTokenNotFoundError":
        hint = "; log in with `hf auth login`, or set HF_TOKEN to a token that may write"
    text = " ".join(str(error).split()) or type(error).__name__
    token = os.environ.get("HF_TOKEN")
    if token:
        text = text.replace(token, "***")
    return re.sub(r"\bhf_\w+", "***", text)[:400] + hint


def _front_matter(card: str) -> str:
    """The YAML at the top of a model card, "" where it has none."""
    found = re.match(r"---\n(.*?)^---$", card, re.DOTALL | re.MULTILINE)
    return found[1] if found else ""
