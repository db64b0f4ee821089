"""The server on a GPU over HTTP: ``python -m tests.benchmarks.gpu_serve CHECKPOINT [--shape 128/128 ...]``.

Streamed completions of random token ids, greedy, in a closed loop, from several client processes on the same
machine. Also measured: seconds from starting the process to the first token, and resident memory.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from server.bench.stream_client import Answer, Target, read_answer, run_load
from tests.benchmarks.server_process import Server, ServerProcess

_CLIENTS = 8
_TIMEOUT = 120.0
# Output tokens a second and TTFT p50 in ms of vLLM 0.26 on one H200, bfloat16, clients on the same machine,
# as measured for the issue that asked for this.
_VLLM = {
    "128/128": {1: (206, 14), 16: (2898, 61), 64: (8664, 150), 256: (15585, 496)},
    "1024/128": {1: (199, 31), 16: (1933, 249), 64: (3386, 638), 256: (4022, 983)},
}


def _client(arguments: tuple[int, list[dict[str, object]], int]) -> list[Answer]:
    port, bodies, concurrency = arguments
    run = run_load(
        Target("127.0.0.1", port),
        "/v1/completions",
        bodies,
        concurrency=concurrency,
        seconds_for_one=_TIMEOUT,
    )
    return [read_answer(exchange) for exchange in run.exchanges]


def measure(
    process: ServerProcess, shape: str, concurrency: int, rounds: int, seed: int
) -> tuple[float, float, float]:
    """Output tokens a second, p50 of the time to the first token and between tokens in ms."""
    num_prompt, num_output = map(int, shape.split("/"))
    # No prompt begins like one of another measurement: nothing may come from the prefix cache.
    rng = np.random.default_rng([seed, num_prompt, num_output, concurrency])
    clients = min(_CLIENTS, concurrency)
    bodies = [
        {
            "model": process.model,
            "prompt": rng.integers(1000, 40000, num_prompt).tolist(),
            "max_tokens": num_output,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for _ in range(max(2, rounds * concurrency))
    ]
    shares = [(process.port, bodies[i::clients], concurrency // clients) for i in range(clients)]
    with multiprocessing.get_context("spawn").Pool(clients) as pool:
        pool.map(abs, range(clients))  # imports before the clock runs
        answers = list(itertools.chain(*pool.map(_client, shares, chunksize=1)))
    begin = min(answer.start for answer in answers)
    end = max(answer.token_times[-1] for answer in answers)
    tokens = sum(answer.num_output_tokens for answer in answers)
    first = [answer.token_times[0] - answer.start for answer in answers]
    rest = [
        (answer.token_times[-1] - answer.token_times[0]) / (answer.num_output_tokens - 1)
        for answer in answers
    ]
    return tokens / (end - begin), 1e3 * float(np.median(first)), 1e3 * float(np.median(rest))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--shape", nargs="*", default=["128/128", "1024/128"], help="tokens in/out")
    parser.add_argument("--concurrency", nargs="*", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--rounds", type=int, default=3, help="requests a client's connection")
    options = parser.parse_args(arguments)
    server = Server(
        "inflightd",
        "",
        (sys.executable, "-m", "server.cli", "serve", str(options.checkpoint), "--port", "{port}",
         "--device", "cuda", "--max-model-len", "8192"),
        ready_path="/health/ready",
    )  # fmt: skip
    log = Path(tempfile.gettempdir()) / "gpu_serve.log"
    for start in ("first start", "second start"):
        with ServerProcess(server, log) as process:
            print(f"{start}: {process.seconds_to_first_answer:.1f} s to the first token", flush=True)
            if start == "first start":
                continue
            print(
                "\n| in/out | at once | tokens/s | vLLM | ratio | TTFT p50 ms | vLLM | ratio | TPOT p50 ms |"
            )
            print("|---|---|---|---|---|---|---|---|---|", flush=True)
            for shape in options.shape:
                for concurrency in options.concurrency:
                    measure(process, shape, concurrency, 1, 1)
                    rate, first, rest = measure(process, shape, concurrency, options.rounds, 2)
                    peer = _VLLM.get(shape, {}).get(concurrency)
                    beside = f"{peer[0]} | {rate / peer[0]:.2f}" if peer else "- | -"
                    beside_first = f"{peer[1]} | {first / peer[1]:.2f}" if peer else "- | -"
                    print(
                        f"| {shape} | {concurrency} | {rate:,.0f} | {beside} | {first:.0f} | {beside_first} "
                        f"| {rest:.2f} |",
                        flush=True,
                    )
            print(f"\npeak resident memory of its processes: {process.peak_memory() / 2**30:.2f} GiB")
    print(log.read_text()[-1500:])


if __name__ == "__main__":
    main()
