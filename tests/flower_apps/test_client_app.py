"""The ClientApp that is bundled refuses a deployment: whatever is asked, and whatever the node says of itself."""

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedmini.flower_apps import client_app, messages, server_app
from tests.flower_apps.in_process_grid import a_context

REAL_NODES = ({}, {"partition-id": 0, "num-partitions": 1})
KINDS = (
    "train",
    "evaluate",
    "query",
    "train.fedmini",
    messages.ASK_CONTRIBUTION,
    messages.ASK_PARTITION,
    "train.other",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("node_config", REAL_NODES, ids=["plain", "with a partition"])
def test_a_real_node_refuses_every_message_and_says_what_to_use(
    kind: str, node_config: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_run_id", "_task_id", "_node_id"):  # as Flower sets them in a node's process
        monkeypatch.setattr(TaskIdentity, name, 1)
    message = Message(RecordDict({"fedmini": ConfigRecord({"config": "x"})}), 1, kind)
    reply = client_app.app(message, a_context(node_config))
    assert reply.has_error() and not reply.has_content()
    assert "a fedmini device never runs code that a server sent" in str(reply.error.reason)
    assert "fedmini.Device" in str(reply.error.reason)


def test_the_apps_are_what_pyproject_names() -> None:
    import tomllib

    from tests.flower_apps.stock_flower import ROOT

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert declared["components"] == {
        "serverapp": f"{server_app.__name__}:app",
        "clientapp": f"{client_app.__name__}:app",
    }
    assert declared["config"] == {"config": "", "output": "", "server-folder": "", "run": ""}
