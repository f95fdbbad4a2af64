"""Translates errors of huggingface_hub 2.4 to DownloadErrors. Imported by the child process only."""

from __future__ import annotations

import errno
from urllib.parse import urlsplit

import httpx2  # huggingface_hub's transport, whose errors it lets through
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from services.downloads.fetcher import DownloadError
from services.downloads.huggingface.names import HubName

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def explain(
    error: Exception, name: HubName, place: str = "the models folder", advice: str = "Check it and try again."
) -> DownloadError | None:
    """Convert `error` to a DownloadError; None if it is unexpected.

    `place` is where the files go, `advice` what to do if it can't be written.
    """
    hub = urlsplit(constants.ENDPOINT).hostname or "the hub"
    match error:
        case DownloadError():
            return error
        case GatedRepoError():
            return DownloadError(
                "access_denied",
                f"{name.repo_id} is gated. Accept the licence on the model's page and set HF_TOKEN to a token of that "
                f"account, then try again. The page: {constants.ENDPOINT}/{name.repo_id}",
            )
        case RepositoryNotFoundError():  # without a token the hub answers 401 both for missing and for private ones
            return DownloadError(
                "unknown_model",
                f"{hub} has no model {name.repo_id} that this machine may see. Check the spelling; if it is private, "
                "set HF_TOKEN.",
            )
        case RevisionNotFoundError():
            return DownloadError("unknown_model", f"{name.repo_id} has no revision {name.revision}.")
        case RemoteEntryNotFoundError():
            return DownloadError("unknown_model", f"{hub} lists a file of {name.repo_id} that it does not have.")
        case HfHubHTTPError():
            return _explain_status(error, hub)
        case OfflineModeIsEnabled():
            return DownloadError("hub_unreachable", "HF_HUB_OFFLINE is set. Unset it to download.", may_resume=True)
        case httpx2.TransportError():
            return DownloadError(
                "hub_unreachable",
                f"{hub} can't be reached: {str(error) or type(error).__name__}. Check the network (and HF_ENDPOINT, "
                "where it is set) and try again; what has arrived is kept.",
                may_resume=True,
            )
        case httpx2.HTTPError() | httpx2.InvalidURL():
            return DownloadError("hub_error", f"{hub} answered in a way that can't be used: {error}.")
        case OSError():
            return _explain_disk(error, place, advice)
    return None


def _explain_status(error: HfHubHTTPError, hub: str) -> DownloadError:
    status, said = error.response.status_code, error.server_message or "nothing more"
    if status in (401, 403):
        return DownloadError(
            "access_denied",
            f"{hub} refused access ({status}, {said}). Check that HF_TOKEN is valid and may read this model.",
        )
    if status == 404:
        return DownloadError("unknown_model", f"{hub} does not have it (404, {said}). Check the spelling.")
    if status == 429 or status >= 500:
        return DownloadError(
            "hub_unreachable",
            f"{hub} can't serve now ({status}, {said}). Try again later; what has arrived is kept.",
            may_resume=True,
        )
    return DownloadError("hub_error", f"{hub} refused the request ({status}, {said}).")


def _explain_disk(error: OSError, place: str, advice: str) -> DownloadError:
    if error.errno in NO_SPACE:
        return DownloadError(
            "disk_full",
            f"The disk of {place} is full. Make room and try again; what has arrived is kept.",
            may_resume=True,
        )
    where = f" ({error.filename})" if error.filename else ""
    return DownloadError(
        "disk_error",
        f"{place[0].upper()}{place[1:]} can't be written: {error.strerror or error}{where}. {advice}",
        may_resume=True,
    )
