"""Settings of a run: frozen dataclasses that check themselves. Standard library only; parsing lives in `launch/arguments.py`.

Field names are the flags (`--learning_rate`) and the keys of a YAML recipe (`learning_rate:`). The help text of a field is
its documentation: meaning, unit, and where a default comes from. What the DeepSpeed JSON owns (ZeRO, buckets, offload,
precision) is not repeated here.
"""

from adakron.config.adapter import AdapterConfig
from adakron.config.data import DATA_FILES, DataConfig
from adakron.config.generation import GenerationConfig
from adakron.config.model import ModelConfig
from adakron.config.run import RunConfig
from adakron.config.training import Interval, TrainingConfig

__all__ = ["DATA_FILES", "AdapterConfig", "DataConfig", "GenerationConfig", "Interval", "ModelConfig", "RunConfig", "TrainingConfig"]
