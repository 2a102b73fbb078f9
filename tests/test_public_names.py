"""What an app or a notebook may import: pinned, and loaded only when it is used."""

import subprocess
import sys

import pytest

import fedmini


def test_the_public_names_are_these() -> None:
    assert fedmini.__all__ == [
        "Conditions",
        "Device",
        "DeviceConditions",
        "FedMiniError",
        "RunConfig",
        "SimulationOptions",
        "SimulationResult",
        "load_run_config",
        "simulate",
    ]
    for name in fedmini.__all__:
        assert getattr(fedmini, name).__name__ == name


def test_simulate_is_a_function_also_after_its_module_was_imported() -> None:
    import fedmini.simulation

    assert callable(fedmini.simulate)
    assert fedmini.simulate is fedmini.simulation.simulate


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        fedmini.nothing  # noqa: B018


def test_importing_fedmini_loads_nothing_heavy() -> None:
    code = "import fedmini, sys; print(sorted({'torch', 'numpy', 'transformers', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
