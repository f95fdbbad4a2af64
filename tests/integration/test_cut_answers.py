"""Non-streamed answers whose engine crashes in the middle: an error can't be sent in them."""

from __future__ import annotations

import pytest
import requests

from tests.support.console import fake_model, wait_until


def test_the_connection_closes_with_the_engine_and_no_traceback_is_logged(start_with_fakes):
    """The client can't take half an answer for a complete one; the log reports that the model ended."""
    console = start_with_fakes(fake_model("cutter", "cut_answer"))
    console.switch("cutter")
    with pytest.raises(requests.exceptions.RequestException):
        console.ask("Hello")
    wait_until(lambda: "a model ended by itself" in console.output(), "its end to be logged")
    assert console.get("/healthz").status_code == 200
    assert "Traceback" not in console.output()
