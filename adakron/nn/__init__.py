"""The mathematics of the adapter, in plain PyTorch. Equations, orders and sources: `README.md` in this folder."""

from adakron.nn.adapter import (
    ACTIVATIONS,
    PROJECTIONS,
    AdaptedLayer,
    Bottleneck,
    BottleneckAdapter,
    adapter_parameter_count,
    layer_width,
    projection_sizes,
)
from adakron.nn.dropout import DropoutMasks, TableDropout
from adakron.nn.kronecker import FactorOrder, kronecker_product
from adakron.nn.projection import Projection, ScoreInit
from adakron.nn.routing import Router
from adakron.nn.rows import Row

__all__ = [
    "ACTIVATIONS",
    "PROJECTIONS",
    "AdaptedLayer",
    "Bottleneck",
    "BottleneckAdapter",
    "DropoutMasks",
    "FactorOrder",
    "Projection",
    "Router",
    "Row",
    "ScoreInit",
    "TableDropout",
    "adapter_parameter_count",
    "kronecker_product",
    "layer_width",
    "projection_sizes",
]
