#!/bin/sh
# Install Chromium's headless shell for the browser tests, or Chromium itself where the shell is no package of its own.
set -eu
for name in chromium-headless-shell chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null 2>&1; then exit 0; fi
done
as_root=""
if [ "$(id -u)" -ne 0 ]; then as_root="sudo"; fi
install() { DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq "$1" >/dev/null; }
echo "Installing Chromium for the browser tests" >&2
$as_root apt-get update -qq
install chromium-headless-shell 2>/dev/null || install chromium
