from __future__ import annotations

from collections.abc import Iterator

import pytest

from scheduler.growth_forecast import GrowthForecast


@pytest.fixture(scope="module", autouse=True)
def no_forecast(request: pytest.FixtureRequest) -> Iterator[None]:
    """Nothing is forecast but in the tests of the forecast: the others are about what happens without."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.module.__name__.endswith("test_growth_forecast"):
            patch.setattr(GrowthForecast, "is_needed", lambda *arguments: False)
        yield
