"""Files that only the current user can have written, for content that is loaded as code or trusted without checks.

The rule is that of OpenSSH's StrictModes: every folder from the root down belongs to the user or the system, and nobody
else can write to it, unless its sticky bit prevents others from renaming files that are not theirs. On systems without
POSIX owners (Windows) there is no check, because other users have no access to a user's profile there.
"""

import contextlib
import os
import stat
from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_HAS_OWNERS = hasattr(os, "geteuid")


def make_private_folder(path: Path) -> Path:
    """Create the folder and missing parents with mode 0700, and return its path with symbolic links resolved.

    Raises:
      OSError: the folder cannot be created, or somebody else could write to it or replace it. The message names the
        folder that is at fault.
    """
    path = _resolved(path)
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    _check_path(existing, is_leaf=existing == path)
    missing = [folder for folder in (path, *path.parents) if folder.is_relative_to(existing) and folder != existing]
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)
    return find_private_folder(path)


def find_private_folder(path: Path) -> Path:
    """Return an existing folder's path with symbolic links resolved.

    Raises:
      OSError: the folder does not exist, or somebody else could write to it or replace it.
    """
    path = _resolved(path)
    _check_path(path, is_leaf=True)
    return path


def check_own_file(path: Path) -> None:
    """Raise OSError unless `path` is a regular file of the current user that nobody else can write to.

    The content can be trusted only in a folder from `make_private_folder` or `find_private_folder`.
    """
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise PermissionError(f"{path} is not a regular file")
    if _HAS_OWNERS and status.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to {_user_name(status.st_uid)}")
    if _HAS_OWNERS and _others_can_write(path, status):
        raise PermissionError(f"{path} can be written to by others")


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except RuntimeError as error:  # links that form a circle
        raise OSError(str(error)) from error


def _check_path(path: Path, *, is_leaf: bool) -> None:
    """Raise OSError if somebody else could replace a folder.

    Args:
      path: an existing folder, without symbolic links.
      is_leaf: also require that others cannot create files in it, which a sticky bit allows.
    """
    # In a container, the root folder may belong to a system user whose ID is not 0.
    trusted = {0, os.geteuid(), Path(path.anchor).stat().st_uid} if _HAS_OWNERS else set()
    for folder in (path, *path.parents):
        status = folder.stat()
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(f"{folder} is not a folder")
        if not _HAS_OWNERS:
            continue
        allowed = {os.geteuid()} if is_leaf and folder == path else trusted
        if status.st_uid not in allowed:
            raise PermissionError(f"{folder} belongs to {_user_name(status.st_uid)}")
        sticky = bool(status.st_mode & stat.S_ISVTX) and not (is_leaf and folder == path)
        if _others_can_write(folder, status) and not sticky:
            raise PermissionError(f"{folder} can be written to by others")


def _others_can_write(path: Path, status: os.stat_result) -> bool:
    """Return whether the mode lets anybody but the owner and the system write."""
    if not status.st_mode & _OTHERS_WRITE:
        return False
    return bool(status.st_mode & stat.S_IWOTH) or not _is_private_group(path, status.st_gid)


def _is_private_group(path: Path, group: int) -> bool:
    """Return whether the user is the group's only member, as on systems with a group per user and umask 002."""
    import grp
    import pwd

    with contextlib.suppress(KeyError, OSError, AttributeError):
        # If there is an access control list, the group's bits apply to everybody on the list.
        if "system.posix_acl_access" in os.listxattr(path):
            return False
        user, entry = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
        return entry.gr_name == user and set(entry.gr_mem) <= {user}
    return False


def _user_name(number: int) -> str:
    import pwd

    try:
        return f"user {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f"user {number}"
