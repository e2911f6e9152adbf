"""What the runs on the cluster train, and how near two of them must end."""

import json
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, BertModel

from adakron.errors import ConfigError
from adakron.packaged import packaged_minilm
from tests.helpers import tiny

GLOBAL_BATCH = 12
"""Examples per step of every run: 1, 2, 3, 4 ranks can share them."""

STEPS = 300


@dataclass(frozen=True)
class Inputs:
    """A model folder, a data folder, and what they are."""

    model: Path
    data: Path
    described: str


def make_inputs(folder: Path) -> Inputs:
    """A random 2-layer BERT and sentences: SST-2's with MiniLM's vocabulary where both are here, else generated ones."""
    beside = Path(__file__).resolve().parents[2].parent / "shared"
    real = Path(os.environ.get("ADAKRON_SHARED", beside)) / "data" / "sst2"
    data = folder / "data"
    try:
        vocabulary = packaged_minilm()
    except ConfigError:
        vocabulary = None
    if vocabulary is None or not real.exists():
        return Inputs(tiny.save_tiny_bert(folder / "model"), tiny.write_classification(data, train=600), "generated sentences")
    data.mkdir()
    for split, count in (("train", 1500), ("validation", 100)):
        with (real / f"{split}.jsonl").open(encoding="utf-8") as rows:
            (data / f"{split}.jsonl").write_text("".join(islice(rows, count)), encoding="utf-8")
    return Inputs(_save_bert(folder / "model", vocabulary), data, "1500 sentences of SST-2")


def _save_bert(folder: Path, vocabulary: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(vocabulary)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=128, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def flags(inputs: Inputs, *, ranks: int) -> list[str]:
    """Flags of launch/train.py, but for its output_dir."""
    return [
        "--deepspeed", "ds_configs/zero2_fp32.json", "--model_name_or_path", str(inputs.model), "--task_name", "sst2",
        "--data_dir", str(inputs.data), "--max_seq_length", "64", "--bottleneck_dim", "8", "--learning_rate", "1e-3", "--dropout", "0.1",
        "--max_steps", str(STEPS), "--logging_steps", "1", "--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", "50",
        "--disable_tqdm", "yes", "--timeout_minutes", "5", "--per_device_train_batch_size", str(GLOBAL_BATCH // ranks),
    ]  # fmt: skip


def largest_difference(folder: Path, reference: Path) -> float:
    """Largest |difference| of any trained number of two runs."""
    found, expected = (load_file(path / "adapter_model.safetensors") for path in (folder, reference))
    assert found.keys() == expected.keys()
    return max(float((found[name] - tensor).abs().max()) for name, tensor in expected.items())


def newest_step(folder: Path) -> int:
    """The step of a run's newest checkpoint; 0 without one."""
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")), default=0)


def logged(folder: Path) -> int:
    """Steps that a run has logged, those it repeats included."""
    file = folder / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def went_on_at(folder: Path) -> list[int]:
    """The steps at which a run was resumed."""
    return [entry["step"] for entry in json.loads((folder / "run.json").read_text()).get("resumed", [])]
