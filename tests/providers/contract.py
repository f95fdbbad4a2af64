"""What every adapter of a provider has to do, whatever stands behind it: the port's contract as tests.

The tests of a capability subclass `ProviderContract` for each adapter and define the fixture `case`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from services.cancellation import Cancelled, CancelToken
from services.providers.ports import Provider, ProviderError
from tests.support.console import wait_until

RETRY_AFTER = 7


@dataclass
class ProviderCase:
    """One adapter. `ask` makes one call, `is_valid` tells whether its result is one.

    `cause` makes what stands behind it show a fault: refuse, busy (for RETRY_AFTER seconds), fail, cut, hang, garble,
    endless. `asked` is the number of requests that have arrived there, `at_work` how many are being answered.
    """

    provider: Provider
    ask: Callable[[CancelToken], object]
    is_valid: Callable[[object], bool]
    cause: Callable[[str], object]
    asked: Callable[[], int]
    at_work: Callable[[], int]

    def refusal(self, fault: str) -> ProviderError:
        """Return the error that a fault leads to; nothing is left running upstream."""
        self.cause(fault)
        with pytest.raises(ProviderError) as caught:
            self.ask(CancelToken())
        wait_until(lambda: self.at_work() == 0, "the request to end upstream")
        return caught.value


class ProviderContract:
    """The contract of `services.providers.ports`. A call that hangs is given up after a time that the fixture sets."""

    def test_it_answers(self, case: ProviderCase):
        """Once ready, without having been switched to or asked for anything."""
        assert case.provider.make_ready(CancelToken()) == 0
        assert case.is_valid(case.ask(CancelToken()))

    def test_a_refusal_is_reported_in_its_own_words(self, case: ProviderCase):
        error = case.refusal("refuse")
        assert error.code == "provider_refused"
        assert "safety" in error.message
        assert error.retry_after is None

    def test_a_rate_limit_says_how_long_to_wait(self, case: ProviderCase):
        error = case.refusal("busy")
        assert (error.code, error.retry_after) == ("rate_limited", RETRY_AFTER)

    def test_a_failure_is_reported(self, case: ProviderCase):
        """The job can't go on with it."""
        error = case.refusal("fail")
        assert error.code == "provider_unavailable"
        assert len(error.message) > 20

    def test_an_answer_that_is_cut_off_is_none(self, case: ProviderCase):
        assert case.refusal("cut").code == "bad_answer"

    def test_a_hanging_call_is_given_up(self, case: ProviderCase):
        assert case.refusal("hang").code == "provider_unavailable"

    def test_a_garbled_answer_is_refused(self, case: ProviderCase):
        assert case.refusal("garble").code == "bad_answer"

    def test_an_endless_answer_is_given_up(self, case: ProviderCase):
        assert case.refusal("endless").code == "bad_answer"

    def test_a_cancel_ends_the_request_upstream(self, case: ProviderCase):
        """At once: it was waiting for the answer."""
        case.cause("hang")
        token = CancelToken()

        def cancel() -> None:
            wait_until(lambda: case.at_work() == 1, "the request to arrive")
            token.cancel()

        canceller = threading.Thread(target=cancel, daemon=True)
        canceller.start()
        with pytest.raises(Cancelled):
            case.ask(token)
        canceller.join()
        wait_until(lambda: case.at_work() == 0, "the request to end upstream")

    def test_after_a_cancel_nothing_is_sent(self, case: ProviderCase):
        token = CancelToken()
        token.cancel()
        with pytest.raises(Cancelled):
            case.ask(token)
        with pytest.raises(Cancelled):
            case.provider.make_ready(token)
        assert case.asked() == 0
