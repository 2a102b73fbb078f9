"""A whole deployment on this machine, from nothing: an operator, a server, and four people's devices as processes.

`python server/smoke_deployment.py [FOLDER]`: every step is a command that an operator or a device's owner gives.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fedmini import load_run_config
from fedmini.data import load_population

RUN = Path(__file__).parent / "deployment.toml"
PORT = 19092


def fedmini(*arguments: object) -> None:
    print("\n$ fedmini", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "fedmini", *map(str, arguments)], check=True)


def main(folder: Path) -> None:
    operator, server, run = folder / "operator", folder / "server", folder / "server/runs/deployment"
    fedmini("operator", "init", operator)
    fedmini(
        "server",
        "init",
        server,
        "--host",
        "127.0.0.1",
        "--port",
        PORT,
        "--operator",
        operator / "operator.pub",
        "--run",
        RUN,
    )
    fedmini("operator", "sign-manifest", operator, run / "manifest.json", "--output", run / "manifest.signed.json")
    people = load_population(load_run_config(RUN).data, None).devices
    names = [f"device-{number}" for number in range(1, len(people) + 1)]
    for name, examples in zip(names, people.values(), strict=True):
        device = folder / name
        fedmini("device", "init", device)
        fedmini("server", "enroll", server, device / "device.pub", "--operator", operator, "--name", name)
        fedmini("device", "enrol", device, operator / f"devices/{name}.json", operator / "operator.pub")
        fedmini("device", "accept", device, run / "manifest.signed.json", "--yes")
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
            file.writelines(json.dumps({"prompt": one.prompt, "response": one.response}) + "\n" for one in examples)
            file.flush()
            fedmini("device", "add", device, file.name)
        (device / "device.toml").write_text(
            f'[device]\nserver = "https://127.0.0.1:{PORT}"\nserver_key = "{server / "tls/ca.crt"}"\n'
            "[conditions]\non_power = false\nidle = false\n"  # a machine that tests is neither
        )
    began, command = time.monotonic(), [sys.executable, "-m", "fedmini", "device", "run"]
    devices = [subprocess.Popen([*command, str(folder / name)]) for name in names]
    try:
        fedmini("server", "start", server)
    finally:
        for device in devices:
            device.terminate()
            device.wait(30)
    fedmini("server", "status", server)
    summary = json.loads((run / "privacy.json").read_text())["summary"]
    assert (run / "adapter/adapter_model.safetensors").exists() and (run / "report.html").exists()
    print(f"\n{len(names)} devices, {time.monotonic() - began:.0f} s from their start to the adapter: {summary}")


if __name__ == "__main__":
    chosen = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="fedmini-"))
    main(chosen.resolve())
