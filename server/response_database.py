"""Responses in a SQLite file: they outlive the server, and several API processes may share them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from server.response_store import StoredResponse

T = TypeVar("T")

_log = logging.getLogger(__name__)
_VERSION = 1
_MAX_BYTES = 2**30
_BUSY_S = 5.0
_RETRY_S = 0.01
# How much is deleted at once when the bound is reached, so that not every response has to.
_SPARE = 0.05


# The total is kept by SQLite itself, since several processes may write.
_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, created REAL NOT NULL, num_bytes INTEGER NOT NULL,
    body BLOB NOT NULL, items BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS oldest ON responses (created);
CREATE TABLE IF NOT EXISTS total (id INTEGER PRIMARY KEY CHECK (id = 0), num_bytes INTEGER NOT NULL);
INSERT OR IGNORE INTO total VALUES (0, 0);
CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON responses BEGIN
    UPDATE total SET num_bytes = num_bytes + NEW.num_bytes;
END;
CREATE TRIGGER IF NOT EXISTS removed AFTER DELETE ON responses BEGIN
    UPDATE total SET num_bytes = num_bytes - OLD.num_bytes;
END;
PRAGMA user_version = {_VERSION};
COMMIT;
"""


class ResponseDatabaseError(Exception):
    """The file cannot be used; the message says why."""


class ResponseDatabase:
    """Keeps responses up to ``max_bytes`` of JSON, and forgets the oldest beyond it.

    SQLite works in a thread of its own. A response that cannot be written is logged, not raised: its client
    has its answer all the same.
    """

    def __init__(self, path: str, max_bytes: int = _MAX_BYTES) -> None:
        """Opens the file, or makes one that only this user may read.

        Raises:
            ResponseDatabaseError: it cannot be opened, or is something else.
        """
        self._max_bytes = max_bytes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="responses-db")
        try:
            self._connection = self._thread.submit(_open, path).result()
        except (OSError, sqlite3.Error) as error:
            self._thread.shutdown()
            raise ResponseDatabaseError(f"cannot use {path} as a database of responses: {error}") from None

    async def put(self, response: StoredResponse) -> None:
        try:
            await self._run(lambda: self._put(response))
        except sqlite3.Error as error:
            _log.error("response %s is not stored: %s", response.id, error)

    async def get(self, response_id: str, owner: str) -> StoredResponse | None:
        row = await self._run(
            lambda: self._connection.execute(
                "SELECT body, items FROM responses WHERE id = ? AND owner = ?", (response_id, owner)
            ).fetchone()
        )
        return None if row is None else StoredResponse(response_id, owner, *row)

    async def delete(self, response_id: str, owner: str) -> bool:
        def work() -> bool:
            with self._connection:
                deleted = self._connection.execute(
                    "DELETE FROM responses WHERE id = ? AND owner = ?", (response_id, owner)
                )
            return deleted.rowcount > 0

        return await self._run(work)

    def close(self) -> None:
        self._thread.submit(self._connection.close).result()
        self._thread.shutdown()

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _put(self, response: StoredResponse) -> None:
        row = (response.id, response.owner, time.time(), response.num_bytes, response.body, response.items)
        with self._connection as connection:
            connection.execute("DELETE FROM responses WHERE id = ?", (response.id,))
            connection.execute("INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?)", row)
            [num_bytes] = connection.execute("SELECT num_bytes FROM total").fetchone()
            if num_bytes > self._max_bytes:
                self._forget_oldest(connection, num_bytes - int(self._max_bytes * (1 - _SPARE)))

    def _forget_oldest(self, connection: sqlite3.Connection, num_bytes: int) -> None:
        """Deletes at least so much."""
        ids: list[tuple[str]] = []
        for response_id, size in connection.execute("SELECT id, num_bytes FROM responses ORDER BY created"):
            ids.append((response_id,))
            num_bytes -= size
            if num_bytes <= 0:
                break
        connection.executemany("DELETE FROM responses WHERE id = ?", ids)


def _open(path: str) -> sqlite3.Connection:
    # SQLite gives its other files the rights of this one.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    connection = sqlite3.connect(path, timeout=_BUSY_S, check_same_thread=False)
    try:
        deadline = time.monotonic() + _BUSY_S
        while True:
            try:
                _prepare(connection)
                return connection
            except sqlite3.OperationalError as error:
                # Of two processes that begin with a new file at once, SQLite refuses one without waiting.
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                connection.rollback()
                time.sleep(_RETRY_S)
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            connection.close()
        raise


def _prepare(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    [version] = connection.execute("PRAGMA user_version").fetchone()
    if version not in (0, _VERSION):
        raise sqlite3.DatabaseError(f"it has version {version}, this server reads version {_VERSION}")
    connection.executescript(_SCHEMA)
