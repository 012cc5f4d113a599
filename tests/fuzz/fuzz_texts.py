"""Traits, pairs, answers, transcripts, policies and thresholds: what is text.

PYTHONPATH=.:tests python tests/fuzz/fuzz_texts.py -max_total_time=300, see README.md.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import atheris_target
import test_fuzz_files as files

from personasteer import traits
from personasteer.derive.elicit import load_responses
from personasteer.monitor.policy import load_policy
from personasteer.monitor.thresholds import load_thresholds
from personasteer.monitor.transcripts import read_conversations
from personasteer.ship.card import evaluations_in
from personasteer.traits.formats import load_pairs, parse_json, parse_toml

SEEDS = [files.TRAIT.encode(), files.as_json(files.PUBLISHED), files.as_toml_file(files.POLICY)]
SEEDS += [files.lines_of(rows) for rows in (files.PAIRS, files.RESPONSES, files.TALKS)]


def trait(path: Path) -> None:
    text = path.read_bytes().decode("utf-8", "replace")
    for parse in (lambda: parse_toml(text, "x"), lambda: parse_json(text, "x", "name")):
        with suppress(traits.TraitError):
            parse()


if __name__ == "__main__":
    atheris_target.run(
        SEEDS, ".jsonl", trait, load_pairs, load_responses, read_conversations, load_policy, load_thresholds,
        lambda p: evaluations_in(p.read_bytes()),
    )  # fmt: skip
