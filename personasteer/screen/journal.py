"""The work of a screening as one SQLite file: rows, texts, the packs they are computed in, and what came of them.

SQLite commits whole transactions or none, so that a killed run loses what it was computing and nothing else.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from personasteer.errors import ArgumentError, PersonasteerError
from personasteer.screen.texts import Text, key_of, packed

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rows (
    part INTEGER, row INTEGER, id TEXT, hash TEXT, problem TEXT, groups TEXT, PRIMARY KEY (part, row)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS turns (
    part INTEGER, row INTEGER, turn INTEGER, text BLOB, PRIMARY KEY (part, row, turn)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS texts (
    key BLOB PRIMARY KEY, n_prompt INTEGER, n_prefix INTEGER, prompt BLOB, prefix BLOB, family BLOB, tokens BLOB
);
CREATE TABLE IF NOT EXISTS prompts (key BLOB PRIMARY KEY, n_tokens INTEGER, tokens BLOB);
CREATE TABLE IF NOT EXISTS packs (kind TEXT, pack INTEGER, cost INTEGER, done INTEGER, PRIMARY KEY (kind, pack));
CREATE TABLE IF NOT EXISTS packed (
    kind TEXT, pack INTEGER, place INTEGER, key BLOB, PRIMARY KEY (kind, pack, place)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, score BLOB);
CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, mean BLOB, text TEXT);
"""
# the same text may come with another prefix, or in another conversation: which it counts to does not hang on the order
ADD_TEXT = """INSERT INTO texts VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE
    SET n_prefix = excluded.n_prefix, prefix = excluded.prefix, family = excluded.family
    WHERE (excluded.prefix, excluded.family) < (prefix, family)"""
PARTS = ("data", "clean", "baseline")


class Packed(NamedTuple):
    """What one pack computes: of kind "given" texts, of kind "own" prompts to answer."""

    kind: str
    pack: int
    n_prefix: int
    cost: int
    texts: list[tuple[bytes, int]]  # (tokens, n_prompt)
    keys: tuple[bytes, ...] = ()  # of the texts in the journal


class Journal:
    """The file of one screening, locked while it is open.

    Args:
        plan: all that the scores depend on. A file of another plan is refused, or with `force` begun anew.

    Raises:
        ArgumentError: the folder cannot be written, another process works there, or it holds another screening.
    """

    def __init__(self, path: Path, plan: Mapping[str, Any], *, force: bool = False) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=0, isolation_level=None)
        except (OSError, sqlite3.Error) as e:
            raise ArgumentError(f"{path.parent}: cannot work here ({getattr(e, 'strerror', None) or e})") from e
        try:
            with self._errors():
                self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = NORMAL")
                self._db.execute("BEGIN EXCLUSIVE")
                for statement in SCHEMA.split(";"):
                    self._db.execute(statement)
                self._claim(plan, force)
                self._db.execute("COMMIT")
        except BaseException:
            self._db.close()
            raise

    def _claim(self, plan: Mapping[str, Any], force: bool) -> None:
        wanted = json.loads(json.dumps(plan))
        text = self.meta("plan")
        if text is None:
            self.set_meta("plan", json.dumps(wanted))
            return
        known = json.loads(text)
        known = known if isinstance(known, dict) else {}
        if known == wanted:
            return
        if force:
            self.clear()
            self.set_meta("plan", json.dumps(wanted))
        else:
            differ = sorted(k for k in {*known, *wanted} if known.get(k) != wanted.get(k))
            raise ArgumentError(
                f"{self._path.parent}: holds another screening (it differs in: {', '.join(differ)}); name another "
                "folder, or begin anew here (--force)"
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as e:
            if "locked" in str(e):
                raise ArgumentError(f"{self._path.parent}: another process works here") from e
            raise PersonasteerError(f"{self._path}: {e}") from e
        except (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.ProgrammingError):
            raise
        except (sqlite3.DatabaseError, UnicodeDecodeError) as e:  # the latter also of SQLite's own words
            raise ArgumentError(f"{self._path}: is no work of a screening, or damaged ({e}); remove it") from e

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One transaction: all of what the block writes, or nothing."""
        with self._errors():
            self._db.execute("BEGIN")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk has ended it already
                    self._db.execute("ROLLBACK")
                raise

    def _all(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._errors():
            return self._db.execute(sql, values).fetchall()

    def _each(self, sql: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        with self._errors():
            yield from self._db.execute(sql, values)

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what is known ----------------------------------------------------------------------------------------------

    def meta(self, name: str) -> str | None:
        found = self._all("SELECT value FROM meta WHERE name = ?", name)
        return str(found[0][0]) if found else None

    def set_meta(self, name: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def clear(self) -> None:
        """Forget everything."""
        for (table,) in self._all("SELECT name FROM sqlite_master WHERE type = 'table'"):
            self._db.execute(f"DELETE FROM {table}")

    # -- rows and their texts ---------------------------------------------------------------------------------------

    def n_rows(self, part: str) -> int:
        return int(self._all("SELECT count(*) FROM rows WHERE part = ?", PARTS.index(part))[0][0])

    def add_row(
        self, part: str, row: int, name: str | None, digest: str, problem: str, groups: Sequence[str | None],
        texts: Sequence[Text],
    ) -> None:  # fmt: skip
        at = PARTS.index(part)
        self._db.execute(
            "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?)", (at, row, name, digest, problem, json.dumps(list(groups)))
        )
        for turn, text in enumerate(texts):
            self._db.execute("INSERT INTO turns VALUES (?, ?, ?, ?)", (at, row, turn, text.key))
            prefix = packed(text.tokens[: text.n_prefix])
            self._db.execute(
                ADD_TEXT,
                (text.key, text.n_prompt, text.n_prefix, key_of(text.prompt), prefix, text.family, packed(text.tokens)),
            )

    def rows(self, part: str) -> Iterator[tuple[int, str | None, str, str, list[str | None]]]:
        """(row, id, hash, problem, groups), in order."""
        sql = "SELECT row, id, hash, problem, groups FROM rows WHERE part = ? ORDER BY row"
        for row, name, digest, problem, groups in self._each(sql, PARTS.index(part)):
            yield row, name, digest, problem, json.loads(groups)

    def turns(self, part: str) -> Iterator[tuple[int, int, int, bytes, bytes | None]]:
        """(row, n_prompt, n_tokens, score, the own answer's mean) of each answer, rows in order."""
        sql = """SELECT row, n_prompt, length(texts.tokens) / 4, score, mean FROM turns
            JOIN texts ON texts.key = turns.text JOIN scores ON scores.key = turns.text
            LEFT JOIN answers ON answers.key = texts.prompt WHERE part = ? ORDER BY row, turn"""
        yield from self._each(sql, PARTS.index(part))

    def row_texts(self, part: str, row: int) -> list[tuple[bytes, int, bytes, str | None]]:
        """(tokens, n_prompt, score, the own answer) of each answer of a row."""
        sql = """SELECT texts.tokens, n_prompt, score, answers.text FROM turns JOIN texts ON texts.key = turns.text
            JOIN scores ON scores.key = turns.text LEFT JOIN answers ON answers.key = texts.prompt
            WHERE part = ? AND row = ? ORDER BY turn"""
        return self._all(sql, PARTS.index(part), row)

    def clean_texts(self, n: int) -> list[tuple[str, bytes, int]]:
        """(hash of the row, tokens, n_prompt) of each answer of n clean rows; rows of the same words are one."""
        sql = """SELECT hash, tokens, n_prompt FROM turns JOIN rows USING (part, row) JOIN texts ON key = text
            WHERE part = ? AND hash IN
                (SELECT DISTINCT hash FROM rows WHERE part = ? AND problem = '' ORDER BY hash LIMIT ?)
            GROUP BY hash, turn"""
        at = PARTS.index("clean")
        return self._all(sql, at, at, n)

    def repeated(self, part: str, column: str) -> tuple[int, list[str]]:
        """(rows whose `column`, id or hash, an earlier row has, too; the first of its values)."""
        at = PARTS.index(part)
        inner = f"""SELECT {column} AS value, count(*) AS n FROM rows WHERE part = ? AND {column} <> ''
            GROUP BY 1 HAVING n > 1"""
        n = self._all(f"SELECT coalesce(sum(n - 1), 0) FROM ({inner})", at)[0][0]
        return int(n), [v for (v,) in self._all(f"SELECT value FROM ({inner}) ORDER BY value LIMIT 20", at)]

    # -- packs ------------------------------------------------------------------------------------------------------

    def texts_in_order(self, fewest: int) -> Iterator[tuple[bytes, bytes, bytes, bytes, int]]:
        """(key, prefix, family, tokens, n_prompt), texts of one prefix together, and of one family; a prefix of fewer
        texts is none.
        """
        sql = """SELECT key, CASE WHEN n >= ? THEN prefix ELSE x'' END AS own, family, tokens, n_prompt FROM texts
            JOIN (SELECT prefix AS p, count(*) AS n FROM texts GROUP BY 1) ON p = prefix
            ORDER BY own, family, tokens, key"""
        return self._each(sql, fewest)

    def add_pack(self, kind: str, pack: int, cost: int, keys: Iterable[bytes]) -> None:
        self._db.execute("INSERT INTO packs VALUES (?, ?, ?, 0)", (kind, pack, cost))
        self._db.executemany(
            "INSERT INTO packed VALUES (?, ?, ?, ?)", ((kind, pack, place, key) for place, key in enumerate(keys))
        )

    def add_prompts(self, rows: Sequence[int] | None = None) -> None:
        """The prompts of these rows of the data; of all parts' rows when None."""
        sql = """INSERT OR IGNORE INTO prompts SELECT texts.prompt, n_prompt, substr(texts.tokens, 1, 4 * n_prompt)
            FROM turns JOIN texts ON texts.key = turns.text"""
        if rows is None:
            self._db.execute(sql)
        else:
            at = PARTS.index("data")
            self._db.executemany(sql + " WHERE part = ? AND row = ?", ((at, row) for row in rows))

    def prompts_in_order(self) -> Iterator[tuple[bytes, int]]:
        """(key, n_tokens), the shortest first."""
        return self._each("SELECT key, n_tokens FROM prompts ORDER BY n_tokens, key")

    def sampled(self, part: str, n: int) -> list[int]:
        """n rows without a problem, which do not depend on their order."""
        sql = "SELECT row FROM rows WHERE part = ? AND problem = '' GROUP BY hash ORDER BY hash LIMIT ?"
        return [row for (row,) in self._all(sql, PARTS.index(part), n)]

    def cost(self, kind: str, *, done: bool = False) -> int:
        """Of all packs, or of those that are done."""
        sql = "SELECT coalesce(sum(cost), 0) FROM packs WHERE kind = ?" + (" AND done" if done else "")
        return int(self._all(sql, kind)[0][0])

    def pending(self, kind: str) -> Iterator[Packed]:
        """The packs that are to be done, in order."""
        for pack, cost in self._all("SELECT pack, cost FROM packs WHERE kind = ? AND NOT done ORDER BY pack", kind):
            if kind == "given":
                sql = """SELECT tokens, n_prompt, key, n_prefix, prefix FROM packed JOIN texts USING (key)
                    WHERE kind = ? AND pack = ? ORDER BY place"""
            else:
                sql = """SELECT tokens, n_tokens, key, 0, x'' FROM packed JOIN prompts USING (key)
                    WHERE kind = ? AND pack = ? ORDER BY place"""
            found = self._all(sql, kind, pack)
            same = len({prefix for *_, prefix in found}) == 1
            n_prefix = int(found[0][3]) if same else 0
            texts = [(tokens, n) for tokens, n, *_ in found]
            yield Packed(kind, pack, n_prefix, cost, texts, tuple(key for _, _, key, *_ in found))

    def finish(self, done: Packed, results: Sequence[tuple[Any, ...]]) -> None:
        """Keep what came of a pack: scores, or (means, text) of own answers."""
        table = "scores VALUES (?, ?)" if done.kind == "given" else "answers VALUES (?, ?, ?)"
        pairs = ((key, *result) for key, result in zip(done.keys, results, strict=True))
        self._db.executemany(f"INSERT OR REPLACE INTO {table}", pairs)
        self._db.execute("UPDATE packs SET done = 1 WHERE kind = ? AND pack = ?", done[:2])
