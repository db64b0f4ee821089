"""Alerts and the dashboard ask for metrics that exist, in PromQL that parses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from scheduler.messages import EngineOutput, FinishReason, Request, SamplingParams
from server.admission import Admission
from server.config import ServerConfig
from server.metrics import Metrics, RequestTimer
from tests.server.in_process_engine import ScriptedEngine

DEPLOY = Path(__file__).parents[2] / "deploy"
_DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana/dashboards/inflightd.json").read_text())
_VARIABLES = {"${prefix}": "inflightd", "$__rate_interval": "1m", "$instance": ".*"}


def alert_expressions() -> Iterator[str]:
    rules = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())
    return (rule["expr"] for group in rules["groups"] for rule in group["rules"])


def dashboard_expressions() -> Iterator[str]:
    for panel in _DASHBOARD["panels"]:
        for target in panel["targets"]:
            expression = target["expr"]
            for name, value in _VARIABLES.items():
                expression = expression.replace(name, value)
            yield expression


def shown_by(prefix: str) -> dict[str, str]:
    """Every series that a server shows after a request: its type, and one of its lines."""
    engine = ScriptedEngine(lambda request: ())
    metrics = Metrics(prefix, "m", engine, Admission(ServerConfig(), engine))
    timer = RequestTimer(metrics, Request("r", (1, 2, 3), SamplingParams(max_tokens=2)))
    for now in (1.0, 2.0):
        timer.observe(EngineOutput("r", (7,)), now)
    timer.finish(FinishReason.LENGTH, 2.0)
    shown, kind = {}, ""
    for line in metrics.text().decode().splitlines():
        if line.startswith("# TYPE"):
            kind = line.split()[-1]
        elif not line.startswith("#"):
            shown[re.split("[{ ]", line)[0]] = f"{kind} {line}"
    return shown


@pytest.fixture(scope="module")
def served_names() -> set[str]:
    return set(shown_by("inflightd"))


@pytest.mark.parametrize("expression", [*alert_expressions(), *dashboard_expressions()])
def test_expressions_parse_and_name_what_is_served(expression: str, served_names: set[str]) -> None:
    promql_parser.parse(expression)
    # After the rest of PromQL is taken away, names are what is left.
    text = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]|\b(by|on)\s*\([^)]*\)', " ", expression)
    names = set(re.findall(r"\b[a-z_:][a-z0-9_:]{2,}\b(?!\s*\()", text)) - {"and", "sum", "max", "rate", "up"}
    names -= {"histogram_quantile"}
    assert names or "up{" in expression
    assert names <= served_names


def test_dashboard_panels_do_not_overlap() -> None:
    assert len({panel["id"] for panel in _DASHBOARD["panels"]}) == len(_DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in _DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_alerts_fire_when_they_should() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt install prometheus)")
    for arguments in (["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run(
            [promtool, *arguments], cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
