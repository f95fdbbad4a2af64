#!/bin/sh
# Installs Debian's Docker engine for the tests, where there is none yet; they run a daemon of their own. It needs ps to
# list the processes of a container.
set -eu
for folder in $(echo "$PATH" | tr ':' ' ') /usr/sbin /sbin; do
    if [ -x "$folder/dockerd" ]; then exit 0; fi
done
as_root=""
if [ "$(id -u)" -ne 0 ]; then as_root="sudo"; fi
echo "Installing Docker for the tests" >&2
$as_root apt-get update -qq
DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends docker.io procps >/dev/null
