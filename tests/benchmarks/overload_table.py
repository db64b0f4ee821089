"""What an overloaded server did, as Markdown: medians of the rounds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

# Title, where the figure is in the record of a phase (``*`` is the kind of client), how it is shown.
_COLUMNS = (
    ("offered/s", "*.offered_per_s", ".0f"),
    ("answers/s", "*.answers_per_s", ".1f"),
    ("tokens/s", "*.tokens_per_s", ".0f"),
    ("refused", "*.refused", ".0f"),
    ("429 ms p50", "*.refused_ms.p50", ".1f"),
    ("p99", "*.refused_ms.p99", ".1f"),
    ("max", "*.refused_ms.max", ".0f"),
    ("retry-after s p50", "*.retry_after_s.p50", ".0f"),
    ("max", "*.retry_after_s.max", ".0f"),
    ("TTFT ms p50", "*.ttft_ms.p50", ".0f"),
    ("p99", "*.ttft_ms.p99", ".0f"),
    ("live ms p50", "health_ms.p50", ".1f"),
    ("p99", "health_ms.p99", ".1f"),
    ("max", "health_ms.max", ".0f"),
    ("API cores", "cores.api", ".2f"),
    ("waits", "waiting.api", ".2f"),
    ("engine cores", "cores.engine", ".2f"),
    ("waits", "waiting.engine", ".2f"),
    ("client cores", "client_cores", ".2f"),
    ("preempted", "counters.num_preemptions_total", ".0f"),
    ("computed again", "counters.recomputed_tokens_total", ".0f"),
)


def table(records: Iterable[Mapping[str, Any]]) -> str:
    """Of records as ``overload`` writes them."""
    rows: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        for phase in record["phases"]:
            for kind in phase["kinds"]:
                rows.setdefault((phase["phase"], kind, record["name"]), []).append(phase)
    titles = ["phase", "clients", "server", "rounds", *(title for title, _, _ in _COLUMNS)]
    lines = ["| " + " | ".join(titles) + " |", "|:--" * 3 + "|--:" * (len(titles) - 3) + "|"]
    for (name, kind, server), phases in rows.items():
        cells = [name, kind, server, str(len(phases))]
        for _, path, form in _COLUMNS:
            values = [value for phase in phases if (value := _at(phase, path.replace("*", kind))) is not None]
            cells.append(format(statistics.median(values), form) if values else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _at(record: Any, path: str) -> float | None:
    for name in path.split("."):
        record = record.get(name)
        if record is None:
            return None
    return float(record)
