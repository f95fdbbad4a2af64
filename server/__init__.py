"""The web server: gunicorn's gevent worker, and what it does differently from gunicorn's own."""
