"""Write the tables of the documents anew from the committed results.

    python benchmarks/tables.py

A table stands between `<!-- python benchmarks/NAME.py --table RESULT -->` and `<!-- end -->`, and is what that command
prints.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "benchmarks/README.md")
MARKED = re.compile(r"(<!-- python benchmarks/(\w+)\.py (.+?) -->\n\n).*?(\n\n<!-- end -->)", re.DOTALL)


def printed(name: str, arguments: str) -> str:
    """What a benchmark prints with these arguments."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        importlib.import_module(name).main(shlex.split(arguments))
    return out.getvalue().strip()


def filled(text: str) -> str:
    """A document with its tables as the results have them."""
    return MARKED.sub(lambda m: m[1] + printed(m[2], m[3]) + m[4], text)


def main() -> None:
    for name in DOCUMENTS:
        file = ROOT / name
        file.write_text(filled(file.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
