"""``inflightd bench serve``: workloads, figures, and the command against a server that keeps a known pace."""

from __future__ import annotations

import json
import math
import statistics
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import uvicorn

from server.api_keys import api_key
from server.app import create_app
from server.bench import bench_command
from server.bench.load_report import Times, _ticks, plot, report_of, table
from server.bench.startup import Start, startup_table
from server.bench.stream_client import Exchange, Run, Target, run_load
from server.bench.workload import Workload, WorkloadError, poisson_starts, read_prompts
from server.cli import main
from server.config import ServerConfig
from server.tokenizer import Tokenizer
from tests.server.in_process_engine import ScriptedEngine, tokens


def test_percentiles_are_numpys() -> None:
    values = np.random.default_rng(3).exponential(size=201)
    times = Times.of(values.tolist())
    expected = [values.mean(), *np.percentile(values, [50, 90, 99])]
    assert [times.mean, times.p50, times.p90, times.p99] == pytest.approx(expected)
    assert Times.of([]) == Times(0, 0, 0, 0)


def test_workloads_are_the_same_for_the_same_seed_and_share_only_what_is_asked() -> None:
    workload = Workload("completions", "m", num_prompt_words=20, num_prefix_words=6)
    bodies = workload.bodies(50, "a")
    assert bodies == workload.bodies(50, "a")
    prompts = [str(body["prompt"]).split() for body in bodies]
    assert {len(prompt) for prompt in prompts} == {26}
    assert len({tuple(prompt[:6]) for prompt in prompts}) == 1
    assert len({tuple(prompt[6:8]) for prompt in prompts}) == 50
    other = [str(body["prompt"]).split() for body in workload.bodies(50, "b")]
    assert other[0][:6] != prompts[0][:6]
    assert "ignore_eos" in bodies[0]
    plain = Workload("chat", "m", prompts=("x", "y"), ignores_eos=False).bodies(3, "a")
    assert [body["messages"] for body in plain] == [[{"role": "user", "content": c}] for c in "xyx"]
    assert "ignore_eos" not in plain[0]


def test_prompts_from_files(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("one\n\ntwo\n")
    assert read_prompts(lines) == ("one", "two")
    objects = tmp_path / "prompts.jsonl"
    objects.write_text('{"prompt": "a\\nb"}\n{"prompt": 3}\n')
    with pytest.raises(WorkloadError, match="line 2"):
        read_prompts(objects)
    with pytest.raises(WorkloadError, match="no_such"):
        read_prompts(tmp_path / "no_such")


def test_poisson_arrivals() -> None:
    starts = poisson_starts(4000, 50.0, "a")
    gaps = [b - a for a, b in zip([0.0, *starts], starts, strict=False)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.06)  # of exponential gaps: the mean


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://x/?a=1", "https://x#a"])
def test_bad_urls(url: str) -> None:
    with pytest.raises(ValueError, match="is not a URL"):
        Target.of(url)


def test_failures_are_counted_and_shown() -> None:
    failed = Run([Exchange(0.0, [], "refused"), Exchange(0.0, [], "refused")], 1.0, 0.0, 0.5)
    report = report_of("2 at once", failed)
    assert (report.num_completed, report.failures) == (0, {"refused": 2})
    assert "2 at once: 2 x refused" in table([report])
    assert "0.5 s after their time" in table([report])


@pytest.fixture(scope="module")
def url(tokenizer: Tokenizer) -> Iterator[str]:
    """A real HTTP server that needs a key, with an engine that answers four tokens at once."""
    engine = ScriptedEngine(tokens([101], [102], [103], [104]))
    config = ServerConfig(model="m", api_key=(api_key("sk-1"),))
    server = uvicorn.Server(
        uvicorn.Config(create_app(config, engine, tokenizer), port=0, log_config=None, lifespan="off")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def test_the_command(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, picture = tmp_path / "figures.json", tmp_path / "figures.svg"
    load = ["--concurrency", "1,4", "--requests", "12", "--prompt-words", "9", "--output-tokens", "4"]
    files = ["--json", str(figures), "--plot", str(picture)]
    arguments = ["bench", "serve", "--url", url, "--api-key", "sk-1", *load, *files]
    assert main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in printed[1:]] == [["1", "at", "once"], ["4", "at", "once"]]
    loads = json.loads(figures.read_text())["loads"]
    for load in loads:
        assert (load["num_requests"], load["num_completed"], load["num_output_tokens"]) == (12, 12, 48)
        assert load["output_tokens_per_second"] == pytest.approx(48 / load["seconds"])
        assert 0 < load["ttft"]["p50"] <= load["ttft"]["p99"] <= load["seconds"]
    drawn = ElementTree.parse(picture).getroot()
    points = [float(point.get("cy", "nan")) for point in drawn.iter("{http://www.w3.org/2000/svg}circle")]
    assert len(points) == 8
    assert all(math.isfinite(point) for point in points)


def test_throughput(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "figures.json"
    load = ["--requests", "10", "--concurrency", "5", "--prompt-words", "9", "--output-tokens", "4"]
    assert (
        main(["bench", "throughput", "--url", url, "--api-key", "sk-1", *load, "--json", str(figures)]) == 0
    )
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[-1] == "failed"
    assert line.split()[:4] == ["5", "at", "once", "10"]
    document = json.loads(figures.read_text())
    [load] = document["loads"]
    assert (document["bench"], load["num_output_tokens"]) == ("throughput", 40)
    all_tokens = load["num_prompt_tokens"] + 40
    assert load["tokens_per_second"] == pytest.approx(all_tokens / load["seconds"])


def test_latency(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "figures.json"
    arguments = ["--requests", "3", "--output-tokens", "4", "--json", str(figures)]
    assert main(["bench", "latency", "--url", url, "--api-key", "sk-1", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["milliseconds", "mean", "p50", "p90", "p99"]
    [load] = json.loads(figures.read_text())["loads"]
    assert (load["load"], load["num_requests"]) == ("1 at once", 3)
    assert float(lines[1].split()[2]) == pytest.approx(load["ttft"]["p50"] * 1e3, rel=0.2)


def test_a_server_that_does_not_start_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("throughput", "latency", "startup"):
        assert main(["bench", kind, "--", "no-such.gguf"]) == 1
        told = capsys.readouterr().err
        assert told.startswith("inflightd bench: the server ended:")
        assert "no-such.gguf" in told


def test_starts_are_shown_a_line_each() -> None:
    starts = [Start(3.254, 3.5, 5 << 20, 6 << 20), Start(4.0, 4.25, 7 << 20, 8 << 20)]
    rows = [line.split() for line in startup_table(starts).splitlines()[1:]]
    assert rows == [["1", "3.25", "3.50", "5", "6"], ["2", "4.00", "4.25", "7", "8"]]


def test_an_open_loop(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "serve", "--url", url, "--api-key", "sk-1", "--endpoint", "chat", "--rate", "40",
                 "--requests", "10", "--output-tokens", "4"]  # fmt: skip
    assert main(arguments) == 0
    assert "40 a second" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ((), "401"),
        (("--api-key", "sk-1", "--model", "nobody"), "404"),
        (("--api-key", "sk-1", "--url", "http://127.0.0.1:9"), "--model"),
        (("--api-key", "sk-1", "--prompts", "/no/such"), "/no/such"),
    ],
)
def test_faults_are_told(
    url: str, extra: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", "--url", url, *extra]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serve", "--concurrency", "1,,2"), "'1,,2': give numbers with commas"),
        (("serve", "--requests", "many"), "'many' is no whole number"),
        (("serve", "--timeout", "0"), "no number of seconds above 0"),
        (("serve", "--temperature", "nan"), "'nan' is no number from 0 on"),
        (("serve", "--plot", "figures.png"), "'figures.png' does not end in .svg"),
        (("serve", "--json", "/no/such/folder/figures.json"), "cannot be written"),
    ],
)
def test_wrong_flags_are_told_before_anything_runs(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["bench", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("throughput", "--url", "http://127.0.0.1:9", "--", "--max-num-seqs", "3"), "leave out --url or"),
        (("startup", "--", "--uds=x.sock"), "takes no --uds"),
    ],
)
def test_flags_that_do_not_go_together_are_told(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_the_url_may_be_that_of_openais_clients(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--url", f"{url}/v1/", "--api-key", "sk-1", "--requests", "1", "--output-tokens", "4"]
    assert main(["bench", "latency", *arguments]) == 0
    assert "TTFT" in capsys.readouterr().out


def test_an_interrupted_benchmark_shows_the_loads_that_are_complete(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = 0

    def run(*arguments: Any, **settings: Any) -> Run:
        nonlocal runs
        runs += 1
        if runs == 3:  # of a warm-up and three loads
            raise KeyboardInterrupt
        return run_load(*arguments, **settings)

    monkeypatch.setattr(bench_command, "run_load", run)
    arguments = ["--url", url, "--api-key", "sk-1", "--concurrency", "1,2,4", "--output-tokens", "4"]
    assert main(["bench", "serve", *arguments]) == 130
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["load", "1"]


def test_ticks_are_round_and_cover_everything() -> None:
    for most in (0.003, 0.1, 0.99, 1.0, 7.2, 60.0, 100.0, 1234.5, 99999.0):
        ticks = _ticks(most)
        assert ticks[-2] < most <= ticks[-1] * (1 + 1e-9)
        assert 2 <= len(ticks) <= 8
    assert _ticks(262.8) == [0, 50, 100, 150, 200, 250, 300]


def test_a_picture_of_one_load() -> None:
    run = Run([], 1.0, 0.0, 0.0)
    ElementTree.fromstring(plot("a < b", [report_of("1 at once", run)]))
