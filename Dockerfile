# Switchyard with its embedded engine. docs/operations.md says how to run it; compose.yaml does so.
#
# BASE: any Debian with Python 3.11. A mirror of PyPI is named as pip itself takes it, such as
# `--build-arg PIP_INDEX_URL=…`: those words stay in the builder's stage and are not in the image.
ARG BASE=python:3.11-slim

FROM ${BASE} AS builder
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
ARG PIP_TRUSTED_HOST
RUN python -m venv --without-pip /opt/venv
COPY requirements.txt /tmp/
RUN python -m pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check \
    --requirement /tmp/requirements.txt
COPY . /app
# Compiled here, since the root folder may be read-only later; by content, because copies need not keep their times.
# Readable for everybody, however strict the umask was where the files were checked out.
WORKDIR /app
RUN python -m compileall -q --invalidation-mode unchecked-hash . \
    && SWITCHYARD_STATE_DIR=/tmp/state /opt/venv/bin/python -m blueprints.compiled_templates \
    && chmod -R a+rX .

FROM ${BASE}
# libgomp1: the embedded engine needs it, and slim images leave it out.
# tini is PID 1: it reaps what a crashed engine leaves behind, and hands on signals from the first moment. gunicorn reaps
# as well, but as PID 1 it is deaf to SIGTERM until it has set up its handlers. -s keeps that so with `pid: host`.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 tini \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin switchyard \
    && install --directory --owner=10001 --group=10001 /data
COPY --from=builder /opt/venv /opt/venv
COPY --from=builder /app /app
RUN ln -s /data/switchyard.toml /app/switchyard.toml

USER 10001:10001
WORKDIR /app
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/data \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    SWITCHYARD_STATE_DIR=/data/state \
    SWITCHYARD_MODELS_DIR=/data/models
VOLUME /data
# No EXPOSE: it listens on loopback only, so a container needs the host's network (`--network host`).
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s CMD ["python", "image/healthcheck.py"]
ENTRYPOINT ["tini", "-s", "--", "image/entrypoint.sh"]
CMD ["gunicorn", "--config", "gunicorn.conf.py"]
