"""What is installed: the extension alone, which finds the libraries of the llama-cpp-python beside it."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest

from personasteer import _core

ROOT = Path(__file__).parent.parent


def test_the_distribution_holds_no_library_of_llama_cpp() -> None:
    try:
        installed = files("personasteer") or []
    except PackageNotFoundError:
        pytest.skip("run from the source folder, without being installed")
    if not installed:
        pytest.skip("what is installed does not say which files it has")
    assert not [str(f) for f in installed if re.search(r"lib(llama|ggml|mtmd)", f.name)]


def test_the_extension_looks_for_libraries_beside_the_package_only() -> None:
    content = Path(_core.__file__).read_bytes()
    origin = b"@loader_path" if sys.platform == "darwin" else b"$ORIGIN"
    assert origin + b"/../llama_cpp/lib\0" in content


def test_wheels_are_repaired_without_the_libraries_that_the_extension_needs() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["cibuildwheel"]
    excluded = re.findall(r"--exclude (\S+)", settings["linux"]["repair-wheel-command"])
    needed = {
        m.decode() for m in re.findall(rb"\0(lib(?:llama|ggml)[a-z-]*\.so[.0-9]*)\0", Path(_core.__file__).read_bytes())
    }
    assert needed <= set(excluded)
    assert sys.platform != "linux" or needed
    assert re.findall(r"--exclude (\S+)", settings["macos"]["repair-wheel-command"]) == ["libllama", "libggml"]
