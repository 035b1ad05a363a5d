"""One API a file, each with a list `ENDPOINTS`; found by their names."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from edgellm.server.endpoint import Endpoint


def endpoints() -> list[Endpoint]:
    names = sorted(module.name for module in iter_modules(__path__))
    return [endpoint for name in names for endpoint in import_module(f"{__name__}.{name}").ENDPOINTS]
