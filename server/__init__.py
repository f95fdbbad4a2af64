"""The web server: a subclass of gunicorn's gevent worker, and the modules that it needs."""
