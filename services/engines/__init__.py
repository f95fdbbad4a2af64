"""Engine adapters: one package per engine, behind the port in `port.py`."""
