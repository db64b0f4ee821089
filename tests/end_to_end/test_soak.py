"""Seconds of what ``tests.robustness.soak`` does for as long as you like, on the server of all tests."""

from __future__ import annotations

import asyncio
import os

from tests.end_to_end.server_process import ServerProcess
from tests.robustness.abuses import ABUSES, SLOW
from tests.robustness.cases import answered, make_cases
from tests.robustness.soak import Soak, left_behind

_SECONDS = float(os.environ.get("INFLIGHTD_SOAK_SECONDS", "2"))


def test_streams_are_what_they_are_in_quiet_whatever_others_do(server: ServerProcess) -> None:
    cases = [answered(case, server.url, is_exact=server.is_exact) for case in make_cases(5, (4, 24), "test")]
    soak = Soak(
        server.url,
        cases,
        "test",
        num_streams=4,
        cancelled=0.2,
        abuse_every=0.05,
        canary_every=0.5,
        kinds=sorted(ABUSES.keys() - SLOW),
    )
    asyncio.run(soak.run(_SECONDS))
    assert soak.violations == []
    assert soak.ledger.ends["done"] > 4
    assert soak.abuses.total() > 10
    assert left_behind(server.metric) == []
