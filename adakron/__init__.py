"""AdaKron: frozen transformers fine-tuned with Kronecker-product adapters on DeepSpeed.

Where things are and who may import whom: the README beside this file.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adakron.adapter_io import save_adapter
    from adakron.api import load_adapter
    from adakron.bank import AdapterBank
    from adakron.config import AdapterConfig
    from adakron.models import adapt
    from adakron.nn import BottleneckAdapter

__version__ = "0.1.0"

__all__ = ["AdapterBank", "AdapterConfig", "BottleneckAdapter", "adapt", "load_adapter", "save_adapter"]

_HOMES = {
    "AdapterBank": "adakron.bank",
    "AdapterConfig": "adakron.config",
    "BottleneckAdapter": "adakron.nn",
    "adapt": "adakron.models",
    "load_adapter": "adakron.api",
    "save_adapter": "adakron.adapter_io",
}


def __getattr__(name: str) -> Any:
    # On first use: torch and transformers take seconds, and most importers of this package want one module of it.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
