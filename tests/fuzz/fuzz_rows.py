"""Data sets: JSONL, JSON, CSV, Parquet and their compressions, told apart by their beginning.

PYTHONPATH=.:tests python tests/fuzz/fuzz_rows.py -max_total_time=300, see README.md.
"""

from __future__ import annotations

import atheris_target
import test_fuzz_files as files

SEEDS = [files.lines_of(rows) for rows in files.ROWS] + [files.as_json(files.ROWS[0])]
SEEDS += [wrap(SEEDS[0]) for wrap in files.WRAPPINGS.values()]

if __name__ == "__main__":
    atheris_target.run(SEEDS, "", files.read_rows)
