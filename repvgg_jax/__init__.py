"""RepVGG for JAX and Flax: train a multi-branch net, deploy a plain stack of 3x3 convolutions."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .public import *  # noqa: F403 (the list of names is there)
    from .public import __all__ as __all__
else:  # A type checker that saw this would take any misspelt name for a public one.

    def __getattr__(name: str) -> Any:
        """Load the public names, and JAX with them, when the first is used: a command must take Ctrl-C over before."""
        if importlib.util.find_spec(f"{__name__}.{name}") is not None:
            return importlib.import_module(f".{name}", __name__)
        public = importlib.import_module(".public", __name__)
        globals().update({public_name: getattr(public, public_name) for public_name in ["__all__", *public.__all__]})
        if name in globals():
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
