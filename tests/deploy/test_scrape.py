"""A real Prometheus scrapes a server."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from scheduler.hashing_executor import HashingExecutor
from server.app import create_app
from server.config import ServerConfig
from server.tokenizer import Tokenizer, load_tokenizer
from tests.server.http_client import serving
from tests.server.in_process_engine import HashingEngine

# Samples that there must be, and what each is at least.
_QUERIES = {
    'up{job="inflightd"}': 1,
    'sum(inflightd:request_success_total{finished_reason="length"})': 3,
    "sum(inflightd:generation_tokens_total)": 12,
    "histogram_quantile(0.5, sum by (le) (inflightd:time_to_first_token_seconds_bucket))": 1e-4,
    "sum(gen_ai_server_request_duration_seconds_count)": 3,
    "process_resident_memory_bytes": 1e6,
    "scrape_samples_scraped": 200,
}


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


@contextmanager
def scraping(port: int, folder: Path) -> Iterator[str]:
    """The URL of a Prometheus that scrapes a port of this machine."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed (Debian: apt install prometheus)")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = folder / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 100ms, scrape_timeout: 100ms}\n"
        f"scrape_configs: [{{job_name: inflightd, static_configs: [{{targets: ['127.0.0.1:{port}']}}]}}]\n"
    )
    process = subprocess.Popen(
        [program, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
         f"--web.listen-address={address}", "--log.level=error"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield f"http://{address}"
    finally:
        process.kill()
        process.wait()


async def test_prometheus_understands_what_is_served(tokenizer: Tokenizer, tmp_path: Path) -> None:
    engine = HashingEngine(HashingExecutor(64, 4, vocab_size=tokenizer.vocab_size, max_model_len=200))
    app = create_app(ServerConfig(), engine, tokenizer)
    async with serving(app) as port, httpx.AsyncClient() as client:
        for _ in range(3):
            body = {"prompt": "x", "max_tokens": 4, "ignore_eos": True}
            await client.post(f"http://127.0.0.1:{port}/v1/completions", json=body)
        with scraping(port, tmp_path) as prometheus:
            for query, least in _QUERIES.items():
                found = await _samples(client, prometheus, query)
                assert len(found) == 1, query
                assert float(found[0]["value"][1]) >= least, query
            state = (await client.get(f"{prometheus}/api/v1/targets")).json()["data"]["activeTargets"]
            assert [(one["health"], one["lastError"]) for one in state] == [("up", "")]
            assert state[0]["lastScrapeDuration"] < 0.1
            metadata = (await client.get(f"{prometheus}/api/v1/metadata")).json()["data"]
            assert metadata["inflightd:time_to_first_token_seconds"][0]["type"] == "histogram"
            assert metadata["inflightd:num_requests_running"][0]["type"] == "gauge"
    await app.state.service.close()


async def _samples(client: httpx.AsyncClient, url: str, query: str) -> list[Any]:
    """What a query finds, once it finds something; nothing after 20 s."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            answer = (await client.get(f"{url}/api/v1/query", params={"query": query})).json()
            if found := answer.get("data", {}).get("result"):
                return list(found)
        except (httpx.TransportError, ValueError):
            pass  # it is still starting
        await asyncio.sleep(0.05)
    return []
