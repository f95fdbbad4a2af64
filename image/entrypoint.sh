#!/bin/sh
# What a container does before Switchyard starts: see that it can write, and bring the demo models along.
set -eu
for folder in "$SWITCHYARD_STATE_DIR" "$SWITCHYARD_MODELS_DIR"; do
    mkdir -p "$folder" 2>/dev/null || true
done
if [ ! -w "$SWITCHYARD_STATE_DIR" ]; then
    echo "User $(id -u) can't write to $SWITCHYARD_STATE_DIR. Give the folder that is mounted there to that user" \
        "(chown $(id -u):$(id -g)), or run the container as its owner (--user)." >&2
    exit 1
fi
# An empty folder that is mounted hides those of the image.
if [ -w "$SWITCHYARD_MODELS_DIR" ] && [ -z "$(ls -A "$SWITCHYARD_MODELS_DIR")" ]; then
    cp models/*.gguf "$SWITCHYARD_MODELS_DIR"
fi
exec "$@"
