#!/bin/sh
# Set up .venv-local-services, what the image and vision servers need, with torch's CPU build, and tiny models for their
# tests. Does nothing if that is done already. Takes 1.3 GB of disk.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
requirements=services/local_servers/requirements.txt
torch=$(sed -n 's/^torch==//p' "$requirements")
venv=.venv-local-services
stamp=$venv/.ready
wanted=$(cat tools/ensure_local_services.sh "$requirements" tests/local_services/tiny_models.py | sha256sum)

if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi
echo "Setting up torch $torch (CPU) and diffusers in $venv; this takes a minute or two" >&2
rm -rf "$stamp" "$venv/models"
test -d "$venv" || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
# "+cpu" is never the build for CUDA, which takes several GB. PyTorch's index has it; pip may also know a file of it.
pip install --no-deps --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu "torch==$torch+cpu"
pip install --requirement "$requirements"
TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 "$venv/bin/python" tests/local_services/tiny_models.py "$venv/models"
echo "$wanted" >"$stamp"
