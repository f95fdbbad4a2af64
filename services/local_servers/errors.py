"""What a request can be answered with instead of what it asked for, and the end of work that nobody waits for."""

from __future__ import annotations


class RequestError(Exception):
    """A request that is answered with an error. `figures` are added to the error object."""

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None, **figures: object) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after = retry_after
        self.figures = figures

    def body(self) -> dict[str, object]:
        return {"error": {"code": self.code, "message": self.message, **self.figures}}


class OutOfMemoryError(RequestError):
    """The work needs more memory than is free. Both figures are bytes; None if unknown."""

    def __init__(self, device: str, free_bytes: int | None, needed_bytes: int | None) -> None:
        said = [f"{_gigabytes(free_bytes)} were free"] if free_bytes is not None else []
        said += [f"about {_gigabytes(needed_bytes)} are needed"] if needed_bytes is not None else []
        message = f"Out of memory on {device}" + (f": {', '.join(said)}." if said else ".")
        super().__init__(507, "out_of_memory", message, free_bytes=free_bytes, needed_bytes=needed_bytes)


class Cancelled(Exception):
    """The work is no longer wanted. The text says why."""


def invalid(message: str) -> RequestError:
    return RequestError(422, "invalid_request", message)


def _gigabytes(value: int) -> str:
    return f"{value / 1e9:.1f} GB"
