"""Where edgellm keeps what can be made or fetched again. Creates nothing: those who write do."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from edgellm.errors import EdgeError


def home() -> Path:
    """The folder in EDGELLM_HOME, else "edgellm" in the user's cache folder.

    Raises EdgeError where the system knows no home folder of this user.
    """
    chosen = os.environ.get("EDGELLM_HOME")
    try:
        return Path(chosen).expanduser() if chosen else _cache_folder() / "edgellm"
    except RuntimeError as error:
        raise EdgeError(
            f"no home folder is known for this user ({error}); set EDGELLM_HOME to a folder for models"
        ) from error


def _cache_folder() -> Path:
    if sys.platform == "win32":
        return _absolute("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return _absolute("XDG_CACHE_HOME") or Path.home() / ".cache"


def _absolute(variable: str) -> Path | None:
    """The folder in that variable; a relative one counts as unset, as the XDG specification says."""
    path = Path(os.environ.get(variable, ""))
    return path if path.is_absolute() else None
