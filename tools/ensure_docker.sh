#!/bin/sh
# Install missing Debian packages for the container tests: the Docker engine (the tests run a daemon of
# their own, which needs ps to list the processes of a container), Compose, and what the app's image is built from.
set -eu
PATH="$PATH:/usr/sbin:/sbin"
missing=""
if ! command -v dockerd >/dev/null; then missing="docker.io"; fi
if ! command -v docker-compose >/dev/null; then missing="$missing docker-compose"; fi
for package in procps libgomp1 tini; do
    if ! dpkg --status "$package" >/dev/null 2>&1; then missing="$missing $package"; fi
done
if [ -z "$missing" ]; then exit 0; fi
as_root=""
if [ "$(id -u)" -ne 0 ]; then as_root="sudo"; fi
echo "Installing for the tests of containers: $missing" >&2
$as_root apt-get update -qq
# shellcheck disable=SC2086 # several words
DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends $missing >/dev/null
