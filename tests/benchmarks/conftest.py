import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest

Call = Callable[[], Any]
RATIOS = pytest.StashKey[dict[str, dict[str, float]]]()


@pytest.fixture
def median_ratio() -> Callable[..., float]:
    """`median_ratio(measured, baseline, repeats)`: how many times as long `measured()` takes.

    The two alternate, and the median is over the ratios of neighbours, so that another load on the machine hits both.
    `clock` gives seconds, by default those on the wall.
    """

    def measure(
        measured: Call, baseline: Call, repeats: int, warm_up: int = 1, clock: Callable[[], float] = time.perf_counter
    ) -> float:
        def seconds(call: Call) -> float:
            start = clock()
            call()
            return clock() - start

        for _ in range(warm_up):
            measured()
            baseline()
        return statistics.median(seconds(measured) / seconds(baseline) for _ in range(repeats))

    return measure


@pytest.fixture
def record_ratio(request: pytest.FixtureRequest) -> Callable[[str, float, float], None]:
    """`record_ratio(name, ratio, limit)`: put a measured ratio into the table and `bench.json`, then hold it to its limit."""

    def record(name: str, ratio: float, limit: float) -> None:
        request.config.stash.setdefault(RATIOS, {})[name] = {"ratio": ratio, "limit": limit}
        assert ratio <= limit, f"{name}: {ratio:.3f} times the baseline, at most {limit:g} allowed"

    return record


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    ratios = config.stash.get(RATIOS, None)
    if not ratios:
        return
    width = max(map(len, ratios))
    terminalreporter.section("ratios")
    terminalreporter.write_line(f"{'':{width}}  {'ratio':>8}  {'at most':>8}")
    for name, row in ratios.items():
        terminalreporter.write_line(f"{name:{width}}  {row['ratio']:8.3f}  {row['limit']:8.3f}")
    path = config.rootpath / "bench.json"
    path.write_text(json.dumps(ratios, indent=2) + "\n")
    terminalreporter.write_line(f"written to {path}")
