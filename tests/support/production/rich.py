"""Hides rich from the consoles that tests start; `tests/support/console.py` puts this folder on their PYTHONPATH.

A test tool installs rich, and structlog imports it, with pygments, wherever it is installed. The app runs on
requirements.txt alone, without rich: importing it took an eighth of each console's start and 4 MB.
"""

raise ImportError("rich isn't in requirements.txt; tests run the app without it, as users do")
