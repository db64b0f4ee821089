"""The dashboard against Grafana's own schema, from which its SDK is made."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

_DASHBOARD: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "deploy/grafana/dashboards/inflightd.json").read_text()
)
plugins.register_default_plugins()  # the options of each kind of panel, and Prometheus' queries


def _unknown(given: Any, understood: Any, at: str = "") -> list[str]:
    """Where something was given that did not come back as it was."""
    if isinstance(given, dict) and isinstance(understood, dict):
        return [
            place
            for key, value in given.items()
            for place in (
                _unknown(value, understood[key], f"{at}/{key}") if key in understood else [f"{at}/{key}"]
            )
        ]
    if isinstance(given, list) and isinstance(understood, list) and len(given) == len(understood):
        pairs = enumerate(zip(given, understood, strict=True))
        return [place for i, (one, other) in pairs for place in _unknown(one, other, f"{at}/{i}")]
    return [] if given == understood else [at]


def _read(dashboard: dict[str, Any]) -> Any:
    return json.loads(JSONEncoder().encode(Dashboard.from_json(copy.deepcopy(dashboard))))


def test_grafana_understands_every_field() -> None:
    assert len(_DASHBOARD["panels"]) > 10
    assert _unknown(_DASHBOARD, _read(_DASHBOARD)) == []


@pytest.mark.parametrize("place", [("fieldConfig",), ("targets", 0), ("options",)])
def test_a_field_that_there_is_not_is_found(place: tuple[str | int, ...]) -> None:
    dashboard = copy.deepcopy(_DASHBOARD)
    panel = next(panel for panel in dashboard["panels"] if panel["type"] == "timeseries")
    for part in place:
        panel = panel[part]
    panel["nosuchfield"] = 1
    assert [place.rsplit("/", 1)[1] for place in _unknown(dashboard, _read(dashboard))] == ["nosuchfield"]
