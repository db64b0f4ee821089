"""Mutated model files: each is loaded or refused with an error of ours, soon, and in bounded memory.

    python -m tests.robustness.fuzz_files --count 250000 [--kinds safetensors,gguf,config,tokenizer]

``--count`` is of each kind. The files are loaded in a process that may be lost; which file it was lost with
is a finding. It may not use more than 512 MiB beyond what it has at its beginning.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from engine_runtime.weights.checkpoint import open_checkpoint
from engine_runtime.weights.errors import CheckpointError
from server.gguf_tokenizer import tokenizer_from_gguf
from server.hf_tokenizer import tokenizer_from_folder
from server.tokenizer import Tokenizer
from server.tokenizer_spec import TokenizerError
from tests.robustness import model_files
from tests.robustness.json_mutations import mutated

_SLOW_S = 1.0
# Without a word from the process, which sends one every few hundred files.
_PATIENCE_S = 60.0
_MEMORY = 512 << 20
_REPORT_EVERY = 500


@dataclass(frozen=True, slots=True)
class FileKind:
    """
    Attributes:
        write: puts a broken file into a folder that is otherwise whole.
        load: reads it as the daemon does.
        errors: what it may raise.
    """

    write: Callable[[Path, random.Random], None]
    load: Callable[[Path], None]
    errors: tuple[type[Exception], ...]


def file_kinds(folder: Path) -> dict[str, FileKind]:
    """All kinds; whole files to start from are put into ``folder``."""
    tensors = model_files.safetensors_file()
    config, tokenizer = model_files.config_json(), model_files.tokenizer_json()
    (folder / "model.safetensors").write_bytes(tensors)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    gguf_path = folder / "model.gguf"
    ggufs = [model_files.gguf_file(gguf_path, kind) for kind in ("gpt2", "llama")]
    # Behind the header lie the tensors, all ones: their first bytes tell where.
    headers = [data.index(b"\x00\x00\x80\x3f" * 8) for data in ggufs]

    def write_gguf(folder: Path, chance: random.Random) -> None:
        number = chance.randrange(len(ggufs))
        gguf_path.write_bytes(model_files.changed_gguf(ggufs[number], headers[number], chance))

    def load_gguf(folder: Path) -> None:
        # The engine reads the same file, whatever the API process says of it.
        with contextlib.suppress(TokenizerError):
            Tokenizer(tokenizer_from_gguf(gguf_path))
        _read_weights(gguf_path)

    return {
        "safetensors": FileKind(
            lambda folder, chance: _write(
                folder / "model.safetensors", model_files.changed_safetensors(tensors, chance)
            ),
            _read_weights,
            (CheckpointError,),
        ),
        "gguf": FileKind(write_gguf, load_gguf, (CheckpointError,)),
        "config": FileKind(
            lambda folder, chance: _write(folder / "config.json", mutated(config, chance)),
            _read_weights,
            (CheckpointError,),
        ),
        "tokenizer": FileKind(
            lambda folder, chance: _write(folder / "tokenizer.json", mutated(tokenizer, chance)),
            _use_tokenizer,
            (TokenizerError,),
        ),
    }


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _read_weights(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    try:
        for name in checkpoint.names:
            checkpoint.read(name)
    finally:
        checkpoint.close()


def _use_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(tokenizer_from_folder(folder))
    tokenizer.decode(tokenizer.encode("AB ab 12 é\n<s>"))


@dataclass
class FileFuzz:
    """What became of the files of one kind."""

    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    slowest: float = 0.0


def try_one(kind: FileKind, name: str, folder: Path, seed: str, number: int, run: FileFuzz) -> None:
    """Writes and loads file ``number`` of a seed."""
    chance = random.Random(f"{name} {seed} {number}")
    kind.write(folder, chance)
    began = time.perf_counter()
    try:
        kind.load(folder)
        run.outcomes["loaded"] += 1
    except kind.errors as error:
        run.outcomes["refused"] += 1
        if not str(error):
            run.findings.append(f"{name} {seed} {number}: an error without words")
    except BaseException as error:  # panics of Rust's are no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        run.outcomes["failed"] += 1
        run.findings.append(f"{name} {seed} {number}: {type(error).__name__}: {str(error)[:200]}")
    seconds = time.perf_counter() - began
    run.slowest = max(run.slowest, seconds)
    if seconds > _SLOW_S:
        run.findings.append(f"{name} {seed} {number}: {seconds:.1f} s")


def _work(name: str, seed: str, numbers: range, report: Connection) -> None:
    """The process that may be lost. Sends the number of the file that it is about to load, and its books."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
    run = FileFuzz()
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as temporary:
        folder = Path(temporary)
        kind = file_kinds(folder)[name]
        for number in numbers:
            if number % _REPORT_EVERY == 0:
                report.send((number, None))
            try_one(kind, name, folder, seed, number, run)
    report.send((numbers.stop, run))


def fuzz(
    name: str, count: int, seed: str, work: Callable[[str, str, range, Connection], None] = _work
) -> FileFuzz:
    """``count`` files of a kind. After a process is lost, another goes on behind the files of its report."""
    total = FileFuzz()
    start = 0
    context = multiprocessing.get_context("spawn")
    while start < count:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(name, seed, range(start, count), sender))
        process.start()
        sender.close()
        reached, run = start, None
        try:
            while run is None and receiver.poll(_PATIENCE_S):
                reached, run = receiver.recv()
        except EOFError:
            pass
        process.kill()
        process.join()
        if run is not None:
            total.outcomes += run.outcomes
            total.findings += run.findings
            total.slowest = max(total.slowest, run.slowest)
            break
        total.findings.append(
            f"{name} {seed}: lost or hung with one of the files {reached} to {reached + _REPORT_EVERY - 1}"
        )
        start = (reached // _REPORT_EVERY + 1) * _REPORT_EVERY
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=250_000)
    parser.add_argument("--kinds", default="safetensors,gguf,config,tokenizer")
    parser.add_argument("--seed", default="0")
    parsed = parser.parse_args()
    num_findings = 0
    for name in parsed.kinds.split(","):
        began = time.monotonic()
        run = fuzz(name, parsed.count, parsed.seed)
        num_findings += len(run.findings)
        for finding in run.findings[:10]:
            print(finding)
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(
            f"{name}: {parsed.count} files of seed {parsed.seed} in {time.monotonic() - began:.0f} s: "
            f"{dict(run.outcomes)}, slowest {run.slowest * 1e3:.0f} ms, peak memory {children:.0f} MiB, "
            f"{len(run.findings)} findings",
            flush=True,
        )
    return 1 if num_findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
