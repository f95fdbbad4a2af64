# Switchyard with its embedded engine. Engines in other containers are reached through the network and the Docker socket.
FROM python:3.11-slim

RUN useradd --create-home --uid 10001 switchyard
WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir --requirement requirements.txt
COPY --chown=switchyard:switchyard . .
USER switchyard

ENV PYTHONUNBUFFERED=1 \
    SWITCHYARD_STATE_DIR=/data/state \
    SWITCHYARD_MODELS_DIR=/data/models
VOLUME /data
EXPOSE 8787
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8787/readyz', timeout=2)"]
CMD ["gunicorn", "--config", "gunicorn.conf.py"]
