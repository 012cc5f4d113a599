"""Chat templates.

PYTHONPATH=.:tests python tests/fuzz/fuzz_template.py -max_total_time=300, see README.md.
"""

from __future__ import annotations

from pathlib import Path

import atheris_target
import test_hostile_models as models

from personasteer import chat
from personasteer.tiny_model import TEMPLATE

chat.PATIENCE = 1.0


def render(path: Path) -> None:
    template = chat.ChatTemplate(path.read_bytes().decode("utf-8", "replace"), "<s>", "</s>")
    template.render([{"role": "user", "content": "hi"}])


if __name__ == "__main__":
    atheris_target.run([TEMPLATE.encode(), *(t.encode() for t in models.TEMPLATES.values())], ".jinja", render)
