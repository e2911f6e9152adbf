"""The mathematics of the adapter, in plain PyTorch. Equations, orders and sources: `README.md` in this folder."""

from adakron.nn.adapter import ACTIVATIONS, AdaptedLayer, KroneckerAdapter, adapter_parameter_count, layer_width
from adakron.nn.kronecker import FactorOrder, kronecker_product

__all__ = [
    "ACTIVATIONS",
    "AdaptedLayer",
    "FactorOrder",
    "KroneckerAdapter",
    "adapter_parameter_count",
    "kronecker_product",
    "layer_width",
]
