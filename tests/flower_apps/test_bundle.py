"""What `flwr run` ships: no code, and nothing that lies about in the folder."""

import io
import zipfile
from pathlib import Path

from flwr.cli.build import build_fab_from_files
from flwr.common.config import validate_config

from tests.flower_apps.stock_flower import ROOT


def bundle(more: dict[str, bytes | Path]) -> bytes:
    names = ("pyproject.toml", "LICENSE", "README.md", ".gitignore", "fedmini/__init__.py")
    return build_fab_from_files({**{name: ROOT / name for name in names}, **more})[0]


def test_the_bundle_holds_two_files_whatever_lies_beside_them() -> None:
    strays = (
        "runs/a/metrics.jsonl",
        "people.jsonl",
        "server/token.json",
        "keys/operator.toml",
        "simulations/chat.toml",
    )
    made = bundle({name: b"{}" for name in strays})
    with zipfile.ZipFile(io.BytesIO(made)) as archive:
        assert archive.namelist() == ["pyproject.toml", "LICENSE", ".info/CONTENT"]
    assert len(made) < 50_000


def test_flower_accepts_the_declaration_and_finds_both_apps_where_fedmini_is_installed(tmp_path: Path) -> None:
    import tomllib

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert validate_config(declared, check_module=True, project_dir=tmp_path) == (True, [], [])
