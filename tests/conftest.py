"""What every test process starts from: one thread, nothing fetched, properties that repeat under CI."""

import os
import shutil
import sys
from pathlib import Path

# Before numpy and torch are imported: tiny models are fastest on one thread, and bit-identity is promised for one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A test that needs the network is wrong; this makes it fail at once instead of waiting.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
# The compiled kernel is built once, not in each test's own cache folder; what starts from here inherits it.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "kernels"))

import pytest
from hypothesis import settings

# No deadline: the machines are shared, and a slow example is no defect. CI repeats the same examples every time.
settings.register_profile("fedmini", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.register_profile("fuzz", deadline=None, derandomize=False)  # minutes of the same examples would be wasted
settings.load_profile("fedmini")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-minutes",
        type=float,
        default=0.0,
        help="minutes for each parser in tests/secagg/test_fuzz.py; 0: seconds",
    )
    parser.addoption(
        "--kill-seeds",
        type=seeds,
        default="6",
        help="runs of tests/deployment/test_kills.py, a kill in each: their number, or the first seed and the one after the "
        "last, as in 100:200",
    )


def seeds(text: str) -> range:
    """`6` is the seeds 0 to 5, `100:200` those from 100 to 199."""
    first, _, stop = text.rpartition(":")
    return range(int(first or 0), int(stop))


@pytest.fixture
def kill_seeds(request: pytest.FixtureRequest) -> range:
    """The seeds of the kills."""
    return request.config.getoption("--kill-seeds")


@pytest.fixture
def fuzz_minutes(request: pytest.FixtureRequest) -> float:
    """How long each parser is attacked; 0 within `make test`, where a number of inputs says it."""
    return request.config.getoption("--fuzz-minutes")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--fuzz-minutes"):
        settings.load_profile("fuzz")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A search has its own time, and as much again to make what it found small."""
    minutes = config.getoption("--fuzz-minutes")
    for item in items:
        if minutes and "fuzz_minutes" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(120 * minutes + 600))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line for each parser that was attacked: how many inputs it had, how many a second, the most memory for one."""
    if not config.getoption("--fuzz-minutes"):
        return
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    for report in sorted(reports, key=lambda report: report.nodeid):
        for name, value in report.user_properties:
            if name == "fuzzed":
                num_inputs, seconds, peak = value
                parser = report.nodeid.partition("[")[2][:-1]
                rate = num_inputs / seconds
                terminalreporter.write_line(
                    f"{parser:40} {num_inputs:10,} inputs {rate:8,.0f} a second {peak / 2**20:8.2f} MiB"
                )


@pytest.fixture(scope="session")
def compiled_kernel(tmp_path_factory: pytest.TempPathFactory) -> object:
    """The compiled kernel; None without a compiler or ninja. Where they are, not to get one is a failure."""
    from fedmini.model import compiling, native

    if shutil.which("c++") is None or shutil.which("ninja") is None:
        return None
    return native.Kernel(compiling.library(tmp_path_factory.getbasetemp(), print))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """A run in this process may have asked for more: the next test starts from one again."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
