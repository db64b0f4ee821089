"""The figures of a load: a table for people, JSON for programs, a picture of latency against load."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from xml.sax.saxutils import escape

from server.bench.stream_client import Answer, ResponseError, Run, read_answer


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @staticmethod
    def of(values: Sequence[float]) -> Times:
        """All zero without values."""
        if not values:
            return Times(0.0, 0.0, 0.0, 0.0)
        ordered = sorted(values)

        def percentile(share: float) -> float:
            position = share * (len(ordered) - 1)
            low = int(position)
            high = min(low + 1, len(ordered) - 1)
            return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

        return Times(statistics.fmean(ordered), percentile(0.5), percentile(0.9), percentile(0.99))


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a server did under one load.

    Attributes:
        load: what it was, such as ``8 at once``.
        seconds: from the first request to the last end.
        ttft: from sending a request to its first text.
        itl: between two events with text of one answer; a server may send several tokens in one.
        tpot: mean time a token of an answer after its first, of answers with more than one.
        e2e: from sending a request to its last text.
        most_late: seconds by which the client fell behind its own schedule, at most.
        failures: how often each failure was seen.
    """

    load: str
    num_requests: int
    num_completed: int
    seconds: float
    num_prompt_tokens: int
    num_output_tokens: int
    ttft: Times
    tpot: Times
    itl: Times
    e2e: Times
    client_cpu_seconds: float
    most_late: float
    failures: dict[str, int]

    @property
    def requests_per_second(self) -> float:
        return self.num_completed / self.seconds

    @property
    def output_tokens_per_second(self) -> float:
        return self.num_output_tokens / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Of prompts and answers together."""
        return (self.num_prompt_tokens + self.num_output_tokens) / self.seconds

    def as_json(self) -> dict[str, object]:
        rates = {
            "requests_per_second": self.requests_per_second,
            "output_tokens_per_second": self.output_tokens_per_second,
            "tokens_per_second": self.tokens_per_second,
        }
        return {**asdict(self), **rates}


def report_of(load: str, run: Run) -> LoadReport:
    answers: list[Answer] = []
    failures: Counter[str] = Counter()
    for exchange in run.exchanges:
        try:
            answers.append(read_answer(exchange))
        except ResponseError as error:
            failures[str(error)[:300]] += 1
    spans = [(a, a.token_times[-1] - a.token_times[0]) for a in answers if a.num_output_tokens > 1]
    return LoadReport(
        load=load,
        num_requests=len(run.exchanges),
        num_completed=len(answers),
        seconds=run.seconds,
        num_prompt_tokens=sum(answer.num_prompt_tokens for answer in answers),
        num_output_tokens=sum(answer.num_output_tokens for answer in answers),
        ttft=Times.of([answer.token_times[0] - answer.start for answer in answers]),
        tpot=Times.of([span / (answer.num_output_tokens - 1) for answer, span in spans]),
        itl=Times.of(
            [
                after - before
                for answer in answers
                for before, after in zip(answer.token_times, answer.token_times[1:], strict=False)
            ]
        ),
        e2e=Times.of([answer.token_times[-1] - answer.start for answer in answers]),
        client_cpu_seconds=run.client_cpu_seconds,
        most_late=run.most_late,
        failures=dict(failures),
    )


_COLUMNS = ("load", "requests/s", "output tokens/s", "TTFT ms p50", "p99", "TPOT ms p50", "p99", "ITL ms p99",
            "whole s p50", "p99", "failed")  # fmt: skip


def table(reports: Sequence[LoadReport]) -> str:
    """In columns, one line a load, failures below."""
    lines = _aligned([_COLUMNS, *map(_row, reports)]) + _failures(reports)
    for r in reports:
        if r.most_late > 0.1:
            lines.append(f"{r.load}: requests were sent up to {r.most_late:.1f} s after their time")
    return "\n".join(lines)


def throughput_table(reports: Sequence[LoadReport]) -> str:
    """How much a load got done, one line each."""
    head = ("load", "requests", "seconds", "requests/s", "prompt tokens", "output tokens", "output tokens/s",
            "all tokens/s", "failed")  # fmt: skip
    rows = [
        (r.load, str(r.num_completed), f"{r.seconds:.2f}", f"{r.requests_per_second:.2f}",
         str(r.num_prompt_tokens), str(r.num_output_tokens), f"{r.output_tokens_per_second:.0f}",
         f"{r.tokens_per_second:.0f}", str(r.num_requests - r.num_completed))
        for r in reports
    ]  # fmt: skip
    return "\n".join(_aligned([head, *rows]) + _failures(reports))


def latency_table(reports: Sequence[LoadReport]) -> str:
    """How long things took, one line a time."""
    rows: list[tuple[str, ...]] = [("milliseconds", "mean", "p50", "p90", "p99")]
    for r in reports:
        for name, times in (("TTFT", r.ttft), ("ITL", r.itl), ("TPOT", r.tpot), ("whole answer", r.e2e)):
            rows.append((name, *map(_milliseconds, (times.mean, times.p50, times.p90, times.p99))))
    return "\n".join(_aligned(rows) + _failures(reports))


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _failures(reports: Sequence[LoadReport]) -> list[str]:
    return [f"{r.load}: {count} x {failure}" for r in reports for failure, count in r.failures.items()]


def _row(r: LoadReport) -> tuple[str, ...]:
    return (
        r.load,
        f"{r.requests_per_second:.2f}",
        f"{r.output_tokens_per_second:.0f}",
        _milliseconds(r.ttft.p50),
        _milliseconds(r.ttft.p99),
        _milliseconds(r.tpot.p50),
        _milliseconds(r.tpot.p99),
        _milliseconds(r.itl.p99),
        f"{r.e2e.p50:.2f}",
        f"{r.e2e.p99:.2f}",
        str(r.num_requests - r.num_completed),
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


_WIDTH, _HEIGHT, _MARGIN = 460, 300, 60
_COLORS = ("#1d5fd1", "#c2571a")


def plot(title: str, reports: Sequence[LoadReport]) -> str:
    """An SVG: TTFT and TPOT, median and 99th percentile, against output tokens a second, one point a load."""
    ordered = sorted(reports, key=lambda r: r.output_tokens_per_second)
    charts = [
        _chart("time to the first token, ms", ordered, [(r.ttft.p50, r.ttft.p99) for r in ordered]),
        _chart("time a token after it, ms", ordered, [(r.tpot.p50, r.tpot.p99) for r in ordered]),
    ]
    width = 2 * (_WIDTH + _MARGIN)
    body = "".join(
        f'<g transform="translate({i * (_WIDTH + _MARGIN)} 40)">{chart}</g>' for i, chart in enumerate(charts)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT + 100}" '
        f'font-family="system-ui, sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="white"/>'
        f'<text x="20" y="24" font-size="15">{escape(title)}</text>{body}</svg>\n'
    )


def _chart(name: str, reports: Sequence[LoadReport], values: Sequence[tuple[float, float]]) -> str:
    x_ticks = _ticks(max(r.output_tokens_per_second for r in reports))
    y_ticks = _ticks(max(max(pair) for pair in values) * 1e3)

    def at(tokens_per_second: float, milliseconds: float) -> tuple[float, float]:
        x = _MARGIN + (_WIDTH - _MARGIN) * tokens_per_second / x_ticks[-1]
        return x, 20 + _HEIGHT * (1 - milliseconds / y_ticks[-1])

    parts = [f'<text x="{_MARGIN}" y="14">{escape(name)}</text>']
    for value in y_ticks:
        _, y = at(0.0, value)
        parts.append(f'<line x1="{_MARGIN}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{_MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in x_ticks:
        x, _ = at(value, 0.0)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT + 36}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<text x="{_WIDTH}" y="{_HEIGHT + 52}" text-anchor="end">output tokens a second</text>')
    for which, (label, color) in enumerate(zip(("p50", "p99"), _COLORS, strict=True)):
        points = []
        for report, pair in zip(reports, values, strict=True):
            x, y = at(report.output_tokens_per_second, pair[which] * 1e3)
            points.append(f"{x:.1f},{y:.1f}")
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}">'
                f"<title>{escape(report.load)}: {label} {pair[which] * 1e3:.1f} ms</title></circle>"
            )
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<text x="{_MARGIN + 10 + 40 * which}" y="36" fill="{color}">{label}</text>')
    return "".join(parts)


def _ticks(most: float) -> list[float]:
    """Round numbers from 0 to the first that is at least ``most``, at most eight of them."""
    if most <= 0:
        return [0.0, 1.0]
    scale = 10.0 ** (math.floor(math.log10(most)) - 1)
    step = next(factor * scale for factor in (1, 2, 5, 10, 20, 50) if factor * scale * 6 >= most)
    return [step * i for i in range(math.ceil(most / step) + 1)]
