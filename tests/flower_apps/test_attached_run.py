"""A run of real devices over a SuperLink of Flower's own: its commands, its TLS, its list of nodes."""

from pathlib import Path

import pytest
from flwr.supercore.run import Run
from flwr.superlink.grid import HttpGrid

from fedmini import checkpoint, server_folder
from fedmini.errors import LinkError, StateError
from fedmini.flower import acquired_task
from fedmini.flower.server_link import ServerLink
from fedmini.flower_apps import attached_run, client_app
from fedmini.privacy.ledger import read_ledger
from tests.deployment.deployed import a_config, deployment
from tests.flower_apps import stock_flower
from tests.flower_apps.in_process_grid import InProcessGrid


def test_a_simulations_grid_leads_to_no_device_and_is_refused() -> None:
    grid = InProcessGrid(client_app.SimulatedOnly(lambda context: True), 1)
    with pytest.raises(StateError, match="a simulation takes config and output"):
        ServerLink.attach(grid, max_payload_bytes=1000)


def test_a_link_takes_over_the_grids_run_and_says_where_nobody_listens() -> None:
    grid = HttpGrid(runtime_api_address=f"127.0.0.1:{stock_flower.free_port()}", insecure=True, token="a secret token")
    grid.set_run(Run.create_empty(17))
    assert "secret" not in repr(acquired_task.of_grid(grid))
    link = ServerLink.attach(grid, max_payload_bytes=1000)
    assert link.run == 17
    with pytest.raises(LinkError, match="can't reach"):
        link.begin(previous=3)  # it ends no run, and begins none: it asks whether the one it has is still known
    assert link.run == 17
    link.end()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_flwr_run_serves_a_run_to_enrolled_devices_over_a_stock_superlink(tmp_path: Path) -> None:
    with deployment(tmp_path, a_config(tmp_path)) as deployed:
        tls = deployed.server_folder / "tls"
        certificates = ("--ssl-ca-certfile", tls / "ca.crt", "--ssl-certfile", tls / "server.crt")
        options = (*map(str, certificates), "--ssl-keyfile", str(tls / "server.key"), "--enable-supernode-auth")
        options += ("--isolation", "process")
        connection = f'root-certificates = "{tls / "ca.crt"}"'
        with stock_flower.superlink(tmp_path / "stock", *options, connection=connection, port=deployed.port) as stock:
            roots = ("--root-certificates", str(tls / "ca.crt"))
            stock.start("flower-superexec", "--runtime-api-address", stock.address, *roots)
            keys = attached_run.write_login_keys(server_folder.opened(deployed.server_folder))
            for name in deployed.people:
                stock.flwr("supernode", "register", str(keys / f"{name}.pub"), "test")
            deployed.start_devices(seeded=False)
            logged = stock.run(server_folder=deployed.server_folder, run=deployed.config.run.name)
        assert "fedmini: run.finished" in logged, logged + stock.logs()
        found = checkpoint.load(deployed.run_folder / "checkpoints")
        assert found is not None and found.state.round_num == 2
        assert any(values.any() for values in found.state.adapter.values())
        lines = read_ledger(deployed.run_folder / "ledger.jsonl")
        assert [(line["round"], line["attempt"], line["seeded"]) for line in lines] == [(1, 0, False), (2, 0, False)]
