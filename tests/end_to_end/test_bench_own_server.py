"""``inflightd bench`` with a server of its own: the real default model, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCH = (sys.executable, "-m", "server.cli", "bench")


@pytest.mark.usefixtures("smollm2_path")
def test_throughput_of_a_server_that_wants_a_key(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    load = ("--requests", "12", "--prompt-words", "20", "--output-tokens", "2", "--json", str(figures))
    flags = ("--max-num-seqs", "2", "--max-model-len", "256")  # 12 at once are more than may wait elsewhere
    ran = subprocess.run(
        [*BENCH, "throughput", *load, "--", *flags],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"INFLIGHTD_API_KEY": "sk-1,sk-2", "INFLIGHTD_UDS": str(tmp_path / "socket")},
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[1].split()[:4] == ["12", "at", "once", "12"]
    [load_figures] = json.loads(figures.read_text())["loads"]
    assert (load_figures["num_completed"], load_figures["num_output_tokens"]) == (12, 24)


def _child_of(pid: int) -> int | None:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else None


def _is_gone(pid: int) -> bool:
    try:
        return re.search(r"^State:\s+Z", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE) is not None
    except FileNotFoundError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_benchmark_that_is_ended_takes_its_server_with_it(number: signal.Signals) -> None:
    bench = subprocess.Popen(
        [*BENCH, "startup"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells ignore it in the background
    )
    deadline = time.monotonic() + 20
    while (server := _child_of(bench.pid)) is None or b"serve" not in Path(
        f"/proc/{server}/cmdline"
    ).read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.4)  # it asks the kernel to end it with its parent once Python runs
    bench.send_signal(number)
    bench.communicate(timeout=30)
    assert bench.returncode == (-number if number is signal.SIGKILL else 128 + number)
    while not _is_gone(server):
        assert time.monotonic() < deadline
        time.sleep(0.01)
