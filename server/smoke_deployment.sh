#!/usr/bin/env bash
# A whole deployment on this machine, from nothing: an operator, a server, and four people's devices as processes. Every step is a
# command that an operator or a device's owner gives.   server/smoke_deployment.sh FOLDER [BIN]
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1 bin=${2:-.venv/bin} port=19092
operator=$folder/operator server=$folder/server run=$folder/server/runs/deployment

say() { printf '\n$ fedmini %s\n' "$*"; "$bin/fedmini" "$@"; }

say operator init "$operator"
say server init "$server" --host 127.0.0.1 --port "$port" --operator "$operator/operator.pub" --run server/deployment.toml
say operator sign-manifest "$operator" "$run/manifest.json" --output "$run/manifest.signed.json"

# Real people's chat, a file each, as an app would have it; removed as soon as the devices have taken it.
"$bin/python" - "$folder" <<'PYTHON'
import json, sys
from pathlib import Path
from fedmini import load_run_config
from fedmini.data import load_population

people = load_population(load_run_config(Path("server/deployment.toml")).data, None).devices.values()
for number, examples in enumerate(people, 1):
    rows = [json.dumps({"prompt": one.prompt, "response": one.response}) for one in examples]
    Path(sys.argv[1], f"device-{number}.jsonl").write_text("\n".join(rows), encoding="utf-8")
PYTHON

devices=()
finish() { [ ${#devices[@]} -eq 0 ] || kill "${devices[@]}" 2>/dev/null || true; wait; }
trap finish EXIT
for number in 1 2 3 4; do
    name=device-$number device=$folder/device-$number
    say device init "$device"
    say server enroll "$server" "$device/device.pub" --operator "$operator" --name "$name"
    say device enrol "$device" "$operator/devices/$name.json" "$operator/operator.pub"
    say device accept "$device" "$run/manifest.signed.json" --yes
    say device add "$device" "$device.jsonl"
    rm "$device.jsonl"
    # A machine that tests is neither idle nor, perhaps, plugged in.
    printf '[device]\nserver = "https://127.0.0.1:%s"\nserver_key = "%s"\n[conditions]\non_power = false\nidle = false\n' \
        "$port" "$server/tls/ca.crt" >"$device/device.toml"
done

began=$SECONDS
for number in 1 2 3 4; do
    "$bin/fedmini" device run "$folder/device-$number" &
    devices+=($!)
done
say server start "$server"
say server status "$server"
for file in adapter/adapter_model.safetensors privacy.json report.html; do
    [ -s "$run/$file" ] || { echo "smoke: the run left no $file" >&2; exit 1; }
done
printf '\nsmoke: four devices, two rounds, %s s from their start to the adapter\n' "$((SECONDS - began))"
