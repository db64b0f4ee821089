"""The guide for operators names alerts, metrics, flags and routes that exist, and all of some."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from fastapi.routing import iter_route_contexts

from scheduler.messages import EngineOutput, FinishReason, Request
from server.admin.admin_routes import router
from server.admission import Admission
from server.config import ServerConfig
from server.metrics import Metrics, RequestTimer
from tests.server.in_process_engine import ScriptedEngine

_ROOT = Path(__file__).parents[2]
_GUIDE = (_ROOT / "docs/operations.md").read_text()


def test_every_alert_is_explained() -> None:
    rules = yaml.safe_load((_ROOT / "deploy/prometheus/alerts.yml").read_text())
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    assert set(re.findall(r"^\| `(Inflightd\w+)` \|", _GUIDE, re.MULTILINE)) == alerts


def test_every_flag_exists() -> None:
    known = {"--" + name.replace("_", "-") for name in ServerConfig.__dataclass_fields__}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", _GUIDE))
    assert named - known == {"--unix-socket", "--json"}  # of curl


def test_every_metric_exists() -> None:
    engine = ScriptedEngine(lambda request: ())
    metrics = Metrics("inflightd", "m", engine, Admission(ServerConfig(), engine))
    timer = RequestTimer(metrics, Request("r", (1,)))
    timer.observe(EngineOutput("r", (7,)), 1.0)
    timer.finish(FinishReason.LENGTH, 2.0)
    served = set(re.findall(r"^# TYPE (?:inflightd:)?(\S+)", metrics.text().decode(), re.MULTILINE))
    table = _GUIDE.partition("## Metrics to watch")[2].partition("## Logs")[0]
    named = set(re.findall(r"`([a-z]+_[a-z_]+)(?:\{\w+\})?`", table)) - {"finish_reason"}
    assert len(named) > 12
    assert named <= served | {name + "_total" for name in served}


def test_every_admin_route_is_listed() -> None:
    routes = {
        str(route.path).replace("{request_id:path}", "ID") for route in iter_route_contexts(router.routes)
    }
    assert set(re.findall(r"/admin/[\w/]+", _GUIDE.partition("## The admin interface")[2])) == routes
