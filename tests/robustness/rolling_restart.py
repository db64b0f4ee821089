"""Two replicas behind nginx are restarted in turn under load: no request may fail.

    python -m tests.robustness.rolling_restart --requests 5000 [--at-once 8] [--pre-stop-seconds 2]

Needs nginx (Debian: nginx-light). A replica gets SIGTERM, takes requests for the pre-stop window while
/health/ready says 503, finishes its streams, exits with 0, and is started again on its port; then it is the
other's turn. nginx knows nothing of it: what is refused, at the socket or with 503, goes to the other one.
Every answer is compared, token by token, with that of a quiet replica (``ledger``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.end_to_end.server_process import ServerProcess
from tests.robustness.cases import answered, make_cases
from tests.robustness.soak import Soak

_CONFIG = """\
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream replicas {{
{servers}
        keepalive 32;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://replicas;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 300s;
            # A replica that ends answers 503 without having begun, or not at all: the other one is asked.
            proxy_next_upstream error http_503 non_idempotent;
        }}
    }}
}}
"""


class Replica:
    """A server on a port of its own that can be ended and started again. Methods block."""

    def __init__(self, port: int, pre_stop_seconds: int) -> None:
        self.port = port
        self._flags = ("--port", str(port), "--pre-stop-seconds", str(pre_stop_seconds), "--threads", "1",
                       "--max-model-len", "512", "--log-level", "warning")  # fmt: skip
        self._server: ServerProcess | None = None
        self.lines: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._server = ServerProcess(*self._flags).__enter__()

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        assert self._server is not None
        self._server.process.terminate()
        status = self._server.process.wait(60)
        self._server.__exit__()
        self.lines += [line for line in self._server.lines if "ERROR" in line or "Traceback" in line]
        return status


@contextmanager
def nginx(port: int, replicas: list[Replica], folder: Path) -> Iterator[None]:
    """nginx in front of the replicas until the end of the block."""
    # Never taken out: with one of two down, a single 503 of the other would leave none for a while.
    servers = "\n".join(f"        server 127.0.0.1:{replica.port} max_fails=0;" for replica in replicas)
    config = folder / "nginx.conf"
    config.write_text(_CONFIG.format(folder=folder, servers=servers, port=port))
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    with subprocess.Popen(
        [program, "-p", str(folder), "-c", str(config), "-e", str(folder / "error.log")]
    ) as process:
        try:
            yield
        finally:
            process.terminate()


async def _load(soak: Soak, count: int, at_once: int, end: float) -> None:
    numbers = iter(range(count))

    async def work() -> None:
        for number in numbers:
            if time.monotonic() > end:
                return
            chance = random.Random(f"{soak.seed} {number}")
            await soak.stream(chance.choice(soak.cases), chance)
            if number % 500 == 499:
                print(f"{number + 1} requests, {len(soak.violations)} violations", flush=True)

    await asyncio.gather(*(work() for _ in range(at_once)))


async def _restart_in_turn(replicas: list[Replica], soak: Soak) -> None:
    """For ever; each restart is an entry of ``soak.restarts``."""
    while True:
        for replica in replicas:
            await asyncio.sleep(1.0)
            began = time.monotonic()
            if status := await asyncio.to_thread(replica.stop):
                soak.faults.append(f"a replica ended with status {status}")
            await asyncio.to_thread(replica.start)
            soak.restarts.append(time.monotonic() - began)


async def _run(soak: Soak, replicas: list[Replica], count: int, at_once: int, end: float) -> None:
    load = asyncio.create_task(_load(soak, count, at_once, end))
    restarting = asyncio.create_task(_restart_in_turn(replicas, soak))
    await asyncio.wait((load, restarting), return_when=asyncio.FIRST_COMPLETED)
    restarting.cancel()
    await asyncio.wait((restarting,))
    if not restarting.cancelled():
        restarting.result()
    await load


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--minutes", type=float, default=60.0, help="no more requests after that")
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--pre-stop-seconds", type=int, default=2)
    parser.add_argument("--seed", default="0")
    parsed = parser.parse_args()
    if not (shutil.which("nginx") or Path("/usr/sbin/nginx").exists()):
        sys.exit("nginx is missing (Debian: apt install nginx-light)")
    replicas = [Replica(_free_port(), parsed.pre_stop_seconds) for _ in range(2)]
    port = _free_port()
    for replica in replicas:
        replica.start()
    with tempfile.TemporaryDirectory() as folder, nginx(port, replicas, Path(folder)):
        cases = [answered(case, replicas[0].url) for case in make_cases(16, (2, 8), parsed.seed)]
        soak = Soak(f"http://127.0.0.1:{port}", cases, parsed.seed, cancelled=0.0)
        began = time.monotonic()
        end = began + 60 * parsed.minutes
        asyncio.run(_run(soak, replicas, parsed.requests, parsed.at_once, end))
        seconds = time.monotonic() - began
        log = (Path(folder) / "error.log").read_text().splitlines()
    for replica in replicas:
        if status := replica.stop():
            soak.faults.append(f"a replica ended with status {status}")
    soak.ledger.balance()
    report = {
        "requests": dict(soak.ledger.ends),
        "seconds": round(seconds),
        "restarts": len(soak.restarts),
        "seconds of a restart": [round(value, 1) for value in soak.restarts],
        "lines in nginx's error log": len(log),
        "the last of them": log[-3:],
        "errors in the logs of the replicas": [line for r in replicas for line in r.lines][:10],
        "violations": soak.violations[:50],
    }
    print(json.dumps(report, indent=1))
    return 1 if soak.violations or not soak.restarts else 0


if __name__ == "__main__":
    raise SystemExit(main())
