"""RepVGG for JAX and Flax: train a multi-branch net, deploy a plain stack of 3x3 convolutions."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .public import *  # noqa: F403 (`public` lists the names)
    from .public import __all__ as __all__
else:  # Hidden from type checkers, which would accept any misspelt name because of `__getattr__`.

    def __getattr__(name: str) -> Any:
        """Load the public names, and JAX, when the first one is used: commands must handle Ctrl-C before that."""
        if importlib.util.find_spec(f"{__name__}.{name}") is not None:
            return importlib.import_module(f".{name}", __name__)
        public = importlib.import_module(".public", __name__)
        globals().update({public_name: getattr(public, public_name) for public_name in ["__all__", *public.__all__]})
        if name in globals():
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
