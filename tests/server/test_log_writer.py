from __future__ import annotations

import io
import logging
import os
import threading
import time

from server.log_writer import LogWriter


def _record(text: str) -> logging.LogRecord:
    return logging.LogRecord("x", logging.INFO, "", 0, text, (), None)


def test_a_pipe_that_nobody_reads_stops_nobody() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream, os.fdopen(reading) as reader:
        log = LogWriter(stream, max_lines=100)
        began = time.monotonic()
        for index in range(5000):
            log.emit(_record(f"{index} {'x' * 100}"))
        assert time.monotonic() - began < 2
        seen: list[str] = []
        thread = threading.Thread(target=lambda: seen.extend(reader), daemon=True)
        thread.start()
        log.flush()
        log.emit(_record("last"))
        log.close()
        stream.close()
        thread.join(5)
    lost = [line for line in seen if "lines of the log were lost" in line]
    num_lost = sum(int(line.split()[0]) for line in lost)
    assert num_lost > 3000
    assert len(seen) - len(lost) + num_lost == 5001
    assert seen[-1] == "last\n"


class _Full(io.StringIO):
    """A disk that is full for a while."""

    is_full = True

    def write(self, text: str) -> int:
        if self.is_full:
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_a_full_disk_loses_lines_and_nothing_else() -> None:
    stream = _Full()
    log = LogWriter(stream)
    log.emit(_record("lost"))
    log.flush()
    stream.is_full = False
    log.emit(_record("kept"))
    log.flush()
    assert stream.getvalue() == "kept\n"
    log.close()


def test_the_end_of_the_process_does_not_wait_for_a_reader() -> None:
    reading, writing = os.pipe()
    stream = os.fdopen(writing, "w")
    log = LogWriter(stream)
    for _ in range(2000):
        log.emit(_record("x" * 100))
    began = time.monotonic()
    log.close()
    assert time.monotonic() - began < 3
    with os.fdopen(reading, "rb") as reader:  # so that the thread ends too
        threading.Thread(target=reader.read, daemon=True).start()
        log.flush()
        stream.close()
