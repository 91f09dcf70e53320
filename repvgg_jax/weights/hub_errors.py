"""Reasons why a request to the Hugging Face hub failed, in one clause that says what to do."""

import errno

from ..errors import reason_of, shown

LOGIN = "the token of HF_TOKEN or `hf auth login`"


def is_no_network(error: BaseException) -> bool:
    """Return whether a download failed because the hub cannot be reached, so that trying again is pointless."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    return isinstance(error, LocalEntryNotFoundError) and _http_error(error) is None


def is_absence(error: BaseException) -> bool:
    """Return whether only this file or revision is missing, so that others may exist on the hub or in the cache."""
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    if is_no_network(error):
        return True
    cause = _http_error(error)
    if cause is not None:  # a mirror's 404 may not state what is missing
        return isinstance(cause, EntryNotFoundError | RevisionNotFoundError) or (
            _status(cause) == 404 and not _is_missing_repository(cause)
        )
    return isinstance(error, EntryNotFoundError)


def reason(error: BaseException, repository: str) -> str:
    """Return why a request to the hub about a repository failed.

    Args:
      error: exception raised by huggingface_hub, its HTTP library or the system.
      repository: owner and name.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
    )

    endpoint, cause = constants.ENDPOINT, _http_error(error)
    if cause is not None:
        status = _status(cause)
        if isinstance(cause, GatedRepoError):
            return f"access to {repository} is restricted: request it at {endpoint}/{repository}"
        if _is_missing_repository(cause):
            return f"{endpoint} has no repository {repository}, or {LOGIN} is missing or may not see it"
        if isinstance(cause, RevisionNotFoundError):
            return f"{repository} has no such revision"
        if status == 404:
            return f"{repository} has no such file"
        if status in (401, 403):
            return f"{endpoint} refuses it ({status}): {LOGIN} is missing, wrong or may not do this"
        message = getattr(cause, "server_message", None)
        return shown(f"{endpoint} answered {status}" + (f": {' '.join(message.split())}" if message else ""))
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, LocalEntryNotFoundError):
        if error.__cause__ is None or isinstance(error.__cause__, OfflineModeIsEnabled):
            return f"HF_HUB_OFFLINE is set, and the cache ({constants.HF_HUB_CACHE}) does not have it"
        why = shown(reason_of(error.__cause__))
        missing = f"{endpoint} cannot be reached ({why}), and the cache ({constants.HF_HUB_CACHE}) does not have it"
        place = f"{endpoint}/{repository}"
        return f"{missing}; download the file from {place} on a machine with internet access, and give its path instead"
    if isinstance(error, OSError) and error.errno is not None:
        what = f"the cache ({constants.HF_HUB_CACHE}) cannot be written: {reason_of(error)}"
        return f"{what}; HF_HUB_CACHE names another folder" if error.errno == errno.ENOSPC else what
    if isinstance(error, OSError) and "Consistency check" in str(error):
        return "the download was interrupted, and nothing of it is kept; try again"
    if isinstance(error, HfHubHTTPError.__bases__[0]):  # the base class is the HTTP library's
        return f"the connection to {endpoint} failed ({shown(reason_of(error))}); try again"
    return shown(f"{type(error).__name__}: {reason_of(error)}")


def _http_error(error: BaseException) -> BaseException | None:
    """Return the error or its cause, whichever holds an HTTP response of the hub; None if neither does."""
    from huggingface_hub.errors import HfHubHTTPError

    errors = (e for e in (error, error.__cause__) if isinstance(e, HfHubHTTPError))
    return next((e for e in errors if e.response is not None), None)


def _status(error: BaseException) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def _is_missing_repository(error: BaseException) -> bool:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    return isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)
