"""OpenAI's official client on Switchyard's own HTTP: every call bounded in time and size, and cancelled at once.

The client is imported with the first call: it takes 0.6 s and 20 MB, which most users never need.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from services.cancellation import CancelToken
from services.engines.openai.account import Account
from services.http import ConnectionBroken, FetchError, TooLarge, TooSlow
from services.native_threads import run_in_thread
from services.providers.adapters.replies import retry_after
from services.providers.ports import ProviderError
from services.redaction import without_key

if TYPE_CHECKING:
    import openai

R = TypeVar("R")

TRANSPORT = "services.providers.adapters.openai_transport"
MODULES = ("openai", "openai.resources.chat.completions", "openai.resources.images", TRANSPORT)
MAX_WORDS = 500
MAX_ADAPTATIONS = 4
DEFAULT_WAIT_SECONDS = 10.0
"""After a rate limit that does not say how long to wait."""
OPTIONAL = ("max_completion_tokens", "temperature", "seed", "response_format")
"""Parameters that not every model and server takes, and without which an answer is still useful."""
SUBSTITUTES = {"max_completion_tokens": "max_tokens"}
"""The older name, which servers other than OpenAI's may only know."""


@dataclass
class OpenAIApi:
    """One API and its key; thread-safe. `seconds` limits each call, `most_bytes` its answer."""

    account: Account
    _refused: dict[str, set[str]] = field(default_factory=dict)
    """Parameters that a model was found not to take."""

    @property
    def has_key(self) -> bool:
        return self.account.key is not None

    def call(
        self,
        function: Callable[[openai.OpenAI, Mapping[str, Any]], R],
        parameters: Mapping[str, Any],
        token: CancelToken,
        *,
        seconds: float,
        most_bytes: int,
    ) -> R:
        """Call a function of the client with `parameters`, again without those of OPTIONAL that the model refuses.

        Raises ProviderError, and Cancelled as soon as `token` is cancelled; the request upstream has ended then.
        """
        library = _library()
        model = str(parameters["model"])
        asked = dict(parameters)
        for known in self._refused.get(model, ()):
            _leave_out(asked, known)
        for _ in range(MAX_ADAPTATIONS):
            try:
                return self._call_once(library, function, asked, token, seconds, most_bytes)
            except library.BadRequestError as error:
                name = _refused_parameter(error, asked)
                if name is None:
                    raise self._as_provider_error(library, error) from None
                self._refused.setdefault(model, set()).add(name)
                _leave_out(asked, name)
        raise ProviderError("provider_refused", f"{model} takes none of the parameters that it was asked with.")

    def _call_once(
        self,
        library: Any,
        function: Callable[[openai.OpenAI, Mapping[str, Any]], R],
        parameters: Mapping[str, Any],
        token: CancelToken,
        seconds: float,
        most_bytes: int,
    ) -> R:
        token.check()
        http = importlib.import_module(TRANSPORT).http_client(token, seconds, most_bytes)
        account = self.account
        try:
            with library.OpenAI(
                api_key=account.key, base_url=account.base_url, max_retries=0, http_client=http
            ) as client:
                return function(client, parameters)
        except library.BadRequestError:
            raise
        except FetchError as error:
            token.check()
            raise _connection_error(error) from None
        except library.OpenAIError as error:
            token.check()
            raise self._as_provider_error(library, error) from None
        except (ValueError, TypeError, AttributeError, RecursionError) as error:  # what the client makes of bad JSON
            raise ProviderError("bad_answer", f"OpenAI's answer can't be read: {type(error).__name__}.") from None

    def _as_provider_error(self, library: Any, error: Any) -> ProviderError:
        """Convert an exception of the client, in OpenAI's own words without the key."""
        if not isinstance(error, library.APIStatusError):
            return ProviderError("bad_answer", "OpenAI's answer is not what its API describes.")
        status, wait = error.status_code, retry_after(error.response.headers.get("retry-after"))
        words = self._words(error)
        if status in (401, 403):
            return ProviderError("provider_unavailable", f"OpenAI refuses the key: {words}")
        if status == 429 and error.code == "insufficient_quota":
            return ProviderError("provider_unavailable", f"OpenAI refuses: {words}")
        if status == 429:
            return ProviderError("rate_limited", words, DEFAULT_WAIT_SECONDS if wait is None else wait)
        if status == 404:
            return ProviderError("provider_unavailable", f"OpenAI refuses: {words}")
        if status >= 500:
            return ProviderError("provider_unavailable", f"OpenAI failed ({status}): {words}", wait)
        return ProviderError("provider_refused", f"OpenAI refuses: {words}")

    def _words(self, error: Any) -> str:
        body = error.body
        said = body.get("message") if isinstance(body, dict) else None
        words = " ".join(said.split())[:MAX_WORDS] if isinstance(said, str) else ""
        return without_key(words, self.account.key or " ") or f"it answered with status {error.status_code}."


_importing = threading.Lock()
_imported = False


def _library() -> Any:
    """Return the client's module. Its import runs in a native thread, so that it delays no other request."""
    global _imported
    with _importing:
        if not _imported:
            run_in_thread(_import)
            _imported = True
    return importlib.import_module(MODULES[0])


def _import() -> None:
    for name in MODULES:
        importlib.import_module(name)


def _connection_error(cause: FetchError) -> ProviderError:
    if isinstance(cause, TooSlow):
        return ProviderError("provider_unavailable", f"OpenAI did not answer in time: {cause}.")
    if isinstance(cause, TooLarge):
        return ProviderError("bad_answer", f"OpenAI's answer is too long: {cause}.")
    if isinstance(cause, ConnectionBroken):
        return ProviderError("bad_answer", f"OpenAI's answer broke off: {cause}.")
    return ProviderError("provider_unavailable", f"OpenAI can't be reached: {cause}.")


def _refused_parameter(error: Any, asked: Mapping[str, Any]) -> str | None:
    """Return which optional parameter a 400 is about, None if about something else."""
    body = error.body if isinstance(error.body, dict) else {}
    message = str(body.get("message", ""))[:2000]
    present = [name for name in (*OPTIONAL, *SUBSTITUTES.values()) if name in asked]
    if error.param in present:
        return str(error.param)
    return next((name for name in present if name in message), None)


def _leave_out(asked: dict[str, Any], name: str) -> None:
    value = asked.pop(name, None)
    if name in SUBSTITUTES and value is not None:
        asked[SUBSTITUTES[name]] = value
