#!/usr/bin/env bash
# make_peers.sh [DIR]: a virtual environment for each peer that `fedmini bench` measures, since their pins conflict.
# About 3 GB and some minutes; what is there already is kept. PYTHON names another interpreter (pfl takes 3.10 to 3.12).
set -eu -o pipefail
folder=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/fedmini/peers}
mkdir -p "$folder"

make_peer() { # make_peer NAME PACKAGE...
    local name=$1
    shift
    [ -e "$folder/$name/complete" ] && return
    echo "installing $name into $folder/$name"
    rm -rf "${folder:?}/$name"
    "${PYTHON:-python3}" -m venv "$folder/$name"
    "$folder/$name/bin/python" -m pip install --disable-pip-version-check -qq "$@"
    touch "$folder/$name/complete"
}

make_peer pfl 'pfl[pytorch]==0.6.0' 'torch==2.13.0' 'transformers==5.23.0' 'peft==0.21.2'
make_peer flower 'flwr[simulation]==1.41.0' 'torch==2.13.0' 'transformers==5.23.0' 'peft==0.21.2'
make_peer torch 'torch==2.13.0' 'transformers==5.23.0' 'peft==0.21.2' 'opacus==1.6.0' 'bitsandbytes==0.50.2' 'setuptools'
