"""Answers that end in the middle and are no streams, so that there is no place in them for an error."""

from __future__ import annotations

import pytest
import requests

from tests.support.console import fake_model, wait_until


def test_the_connection_breaks_with_the_engine_and_the_log_has_no_traceback(start_with_fakes):
    """The client can't take half of an answer for a whole one; what the log says is that the model ended."""
    console = start_with_fakes(fake_model("cutter", "cut_answer"))
    console.switch("cutter")
    with pytest.raises(requests.exceptions.RequestException):
        console.ask("Hello")
    wait_until(lambda: "a model ended by itself" in console.output(), "its end to be noticed")
    assert console.get("/healthz").status_code == 200
    assert "Traceback" not in console.output()
