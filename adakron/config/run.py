"""Settings of a whole run."""

from dataclasses import dataclass
from typing import Any

from adakron.config.adapter import AdapterConfig
from adakron.config.data import DataConfig
from adakron.config.model import ModelConfig
from adakron.config.training import TrainingConfig
from adakron.settings import Settings


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """All settings of a run and the path of its DeepSpeed JSON."""

    model: ModelConfig
    adapter: AdapterConfig
    data: DataConfig
    training: TrainingConfig
    deepspeed: str

    def problems(self) -> list[str]:
        return self._quantization_problems() + self._merge_problems()

    def _quantization_problems(self) -> list[str]:
        if self.model.quantization is None:
            return []
        found = []
        if self.adapter.preset is not None and self.adapter.preset.trains == "all":
            found.append(f"method {self.adapter.method} trains the backbone, which quantization freezes; drop --quantization")
        if self.adapter.head_modules is not None:
            # They are chosen when the model is there, quantised.
            found.append("head_modules names what trains, which quantization would freeze; drop --head_modules or --quantization")
        return found

    def _merge_problems(self) -> list[str]:
        if not self.training.merge_experts:
            return []
        if (self.adapter.resolved().num_experts or 1) == 1:
            return [
                "merge_experts is set, but there is one expert, so it would do nothing; set --num_experts above 1, or drop --merge_experts"
            ]
        level = self.adapter.inference_level
        if level != 3:
            return [
                f"merge_experts saves the average of the experts, but with inference_level {level} the run's scores would be those of"
                " random ones; set --inference_level 3, or drop --merge_experts"
            ]
        return []

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunConfig":
        """The inverse of `to_dict`. Raises TypeError for unknown names and ConfigError for bad values."""
        # The first runs with mixtures recorded a setting of the training there, which a finished run does not need.
        adapter = {name: value for name, value in values["adapter"].items() if name != "merge_experts"}
        return cls(
            model=ModelConfig(**values["model"]),
            adapter=AdapterConfig(**adapter),
            data=DataConfig(**values["data"]),
            training=TrainingConfig(**values["training"]),
            deepspeed=values["deepspeed"],
        )
