import shlex

import pytest

from adakron.config import AdapterConfig, RunConfig
from adakron.errors import ConfigError
from launch.arguments import parse_train

# The published README's quick start, its script replaced by launch/train.py (method.md 2.1).
QUICK_START = """
--task_name mnli --do_train --do_eval --max_seq_length 128 --per_device_train_batch_size 64 --learning_rate 3e-4
--num_train_epochs 20 --evaluation_strategy epoch --save_strategy epoch --warmup_ratio 0.06 --apply_expert_soup
--adapter_size 16 --seed 1234 --weight_decay 0.1 --overwrite_output_dir --logging_steps 1000 --logging_dir DIR
"""


def test_without_arguments_everything_has_its_default():
    config = parse_train([])
    assert config.data.task_name == "quickstart"
    assert config.adapter.method == "adakron"
    assert config.deepspeed.endswith("zero2.json")


def test_the_published_quick_start_means_what_it_says():
    config = parse_train(shlex.split(QUICK_START))
    assert (config.data.task_name, config.data.max_seq_length) == ("mnli", 128)
    assert (config.adapter.method, config.adapter.bottleneck_dim, config.adapter.kron_factor) == ("adakron", 16, 4)
    training = config.training
    assert (training.do_train, training.do_eval, training.do_predict) == (True, True, None)
    assert (training.per_device_train_batch_size, training.learning_rate, training.num_train_epochs) == (64, 3e-4, 20.0)
    assert (training.eval_strategy, training.save_strategy) == ("epoch", "epoch")
    assert (training.warmup_ratio, training.weight_decay, training.seed) == (0.06, 0.1, 1234)
    assert (training.overwrite_output_dir, training.logging_steps, training.logging_dir) == (True, 1000, "DIR")


def test_default_is_below_recipe_is_below_command_line(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 3e-4\nbottleneck_dim: 16\ntask_name: rte\ndo_train: true\ncache_dir: null\neval_strategy: no\n")
    config = parse_train(["--config", str(recipe), "--bottleneck_dim", "32"])
    assert config.training.learning_rate == 3e-4  # YAML itself reads 3e-4 as a string
    assert config.adapter.bottleneck_dim == 32
    assert config.data.task_name == "rte"
    assert config.training.do_train is True
    assert config.training.weight_decay == 0.0
    assert config.training.eval_strategy == "no"  # which YAML itself reads as false


def test_one_recipe_serves_methods_that_do_not_need_all_of_it(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("bottleneck_dim: 16\nkron_factor: 8\n")
    assert [parse_train(["--config", str(recipe), "--method", method]).adapter.method for method in ("head", "lora")] == ["head", "lora"]


def test_launcher_flags_are_accepted():
    assert parse_train(["--local_rank=1"]).training.seed == 42
    assert parse_train(["--local-rank", "0"]).training.seed == 42


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--learning_rat 1", "did you mean --learning_rate"),
        ("--task cola", "unknown flag --task"),
        ("--max-hour 2", r"unknown flag --max-hour; did you mean --max_hours\?$"),
        ("--learning_rate fast", "learning_rate"),
        ("--bottleneck_dim 50", r"bottleneck_dim \(50\) must be divisible by kron_factor \(4\); try --bottleneck_dim 48 or 52"),
        ("--warmup_ratio 2", "warmup_ratio is 2.0"),
        ("--lr_scheduler_type quadratic", "lr_scheduler_type"),
        ("--method head --apply_expert_soup", "drop one"),
        ("--bf16 --fp16", "choose one"),
        ("--max_steps 0", "max_steps is 0"),
        ("--learning_rate nan", "learning_rate is nan"),
        ("--load_best_model_at_end --eval_strategy no", "--eval_strategy"),
        ("--num_experts 0", "num_experts is 0"),
        ("--method lora --num_experts 2", "num_experts is 2, but method lora has no adapters"),
        ("--method Lora!", "method is 'Lora!'"),
        ("--inference_level 0", "inference_level is 0, but there is one expert"),
        ("--inference_level 4 --num_experts 2", "inference_level"),
        ("--tune_expert_scores", "there is one expert, so it would do nothing"),
        ("--merge_experts", "there is one expert, so it would do nothing"),
        ("--method lora --merge_experts", "there is one expert, so it would do nothing"),
        ("--method madakron --merge_experts --inference_level 0", "with inference_level 0 .* random ones; set --inference_level 3"),
        ("--num_experts 2 --merge_experts --inference_level 1", "with inference_level 1 .* random ones; set --inference_level 3"),
        ("--method madakron --experts_in down", "experts_in names down; madakron has down_a, down_b, up"),
        ("--num_experts 2 --experts_in=", "no projection has experts"),
        ("--method madakron --experts_in down_a,up,down_a", r"name a projection once \(set --experts_in down_a,up\)"),
        ("--method head --layers 1", "layers places adapters, and method head has none"),
        ("--method pfeiffer --num_experts 2", "no projection has experts; name some of down, up"),
        ("--method lora --method_config=", "--method_config is empty"),
        ('--method lora --method_config \'{"r": 8, "r": 16}\'', "key r appears twice"),
        ("--method_config x.json", "method_config belongs to methods of PEFT's"),
        ("--position both --target_modules x", "position says nothing"),
        ("--method lora --bottleneck_dim 8", "--bottleneck_dim does nothing with method lora; .* --method_config"),
        ("--method bitfit --adapter_size=8", "--adapter_size does nothing with method bitfit"),
        ("--method pfeiffer --factor_order a_major", "--factor_order does nothing with method pfeiffer; .* another --method"),
        ("--global_batch_size 8 --gradient_accumulation_steps 2", "both set; .* drop --gradient_accumulation_steps"),
        ("--global_batch_size 0", "global_batch_size is 0; it must be at least 1"),
        ("stray", "unexpected argument 'stray'"),
        ("--config nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_a_bad_argument_is_one_clear_error(arguments, said):
    with pytest.raises(ConfigError, match=said):
        parse_train(shlex.split(arguments))


def test_merging_is_a_matter_of_the_run_and_older_records_are_read():
    config = parse_train(["--method", "madakron", "--merge_experts"])
    assert config.training.merge_experts and "merge_experts" not in config.to_dict()["adapter"]
    record = config.to_dict()
    assert RunConfig.from_dict(record) == config
    del record["training"]["merge_experts"]
    record["adapter"] |= {"merge_experts": True, "inference_level": 0}
    assert RunConfig.from_dict(record).adapter.inference_level == 0


def test_problems_of_several_groups_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        parse_train(shlex.split("--bottleneck_dim 50 --max_seq_length 0 --seed -1"))
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rte: 1", "unknown key 'learning_rte'; did you mean learning_rate"),
        ("learning_rate: [1, 2]", "learning_rate is a list"),
        ("- a\n- b", "must hold `key: value` lines"),
        ("a: b: c", "not valid YAML"),
        ("seed: 1\nseed: 2", "seed appears twice"),
        ("local_rank: 0", "unknown key"),
        ("lr_scheduler_type: quadratic", "recipe.yaml.*quadratic"),
        ("seed: yes", "recipe.yaml.*seed"),
    ],
)
def test_a_bad_recipe_is_one_clear_error(tmp_path, text, said):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=said):
        parse_train(["--config", str(recipe)])


def test_a_recipe_may_use_the_other_names_of_a_flag(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("adapter_size: 16\nevaluation_strategy: no\n")
    config = parse_train(["--config", str(recipe)])
    assert (config.adapter.bottleneck_dim, config.training.eval_strategy) == (16, "no")


@pytest.mark.parametrize("value", ["8", 8.5, True, None])
def test_python_values_of_the_wrong_type_are_refused(value):
    with pytest.raises(ConfigError, match=r"bottleneck_dim is .*; it must be int"):
        AdapterConfig(bottleneck_dim=value)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", (1, "", "gelu", "ffn")),
        ("--num_experts 2", (2, "down_a,down_b", "gelu", "ffn")),
        ("--method madakron", (4, "down_a,down_b", "gelu", "ffn")),
        ("--method madakron_partial --num_experts 8", (8, "down_a", "gelu", "ffn")),
        ("--method madakron --num_experts 1", (1, "", "gelu", "ffn")),
        ("--method adamix", (4, "down", "gelu", "ffn")),
        ("--method pfeiffer", (1, "", "relu", "ffn")),
        ("--method houlsby --activation gelu", (1, "", "gelu", "both")),
        ("--target_modules x", (1, "", "gelu", None)),
        ("--method full", (None, None, None, None)),
    ],
)
def test_a_method_fills_in_what_is_left_open(arguments, expected):
    adapter = parse_train(shlex.split(arguments)).adapter
    assert (adapter.num_experts, adapter.experts_in, adapter.activation, adapter.position) == expected
