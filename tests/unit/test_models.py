import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from adakron.backbone import NewParameters
from adakron.config import AdapterConfig
from adakron.errors import ConfigError
from adakron.models import (
    adapt,
    adapter_buffers,
    checkpoint_activations,
    expected_adapter_parameters,
    is_random_in_training,
    new_adapter,
    route_experts,
    set_inference_level,
)
from adakron.nn import AdaptedLayer, BottleneckAdapter, adapter_parameter_count
from adakron.placement import PLACEMENT, find_sites
from adakron.trainable import AdaptedModelInfo, assert_trainable, parameter_report, trainable_groups
from tests.helpers.architectures import tiny_batch, tiny_model

CONFIG = AdapterConfig(bottleneck_dim=8)
SITES = {
    "bert": ["bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.output.dense"],
    "roberta": ["roberta.encoder.layer.0.output.dense", "roberta.encoder.layer.1.output.dense"],
    "electra": ["electra.encoder.layer.0.output.dense", "electra.encoder.layer.1.output.dense"],
    "deberta": ["deberta.encoder.layer.0.output.dense", "deberta.encoder.layer.1.output.dense"],
    "deberta-v2": ["deberta.encoder.layer.0.output.dense", "deberta.encoder.layer.1.output.dense"],
    "distilbert": ["distilbert.transformer.layer.0.ffn.lin2", "distilbert.transformer.layer.1.ffn.lin2"],
    "gpt2": ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"],
}
HEADS = {
    "bert": ["classifier"],
    "roberta": ["classifier"],
    "electra": ["classifier"],
    "deberta": ["pooler", "classifier"],
    "deberta-v2": ["pooler", "classifier"],
    "distilbert": ["pre_classifier", "classifier"],
    "gpt2": ["score"],
}
POOLER = ("bert.pooler.dense.bias", "bert.pooler.dense.weight")
every_architecture = pytest.mark.parametrize("model_type", SITES)


def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(**tiny_batch()).logits


def test_an_adapter_behind_a_quantised_layer_has_the_models_dtype() -> None:
    layer = nn.Linear(6, 8).to(torch.bfloat16)
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    plain = new_adapter(layer, CONFIG.resolved(), torch.float16, generators[0])
    layer.weight = nn.Parameter(torch.zeros(24, 1, dtype=torch.uint8), requires_grad=False)
    packed = new_adapter(layer, CONFIG.resolved(), torch.float16, generators[1])
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16} and {p.dtype for p in packed.parameters()} == {torch.float16}
    assert plain.up.weight.shape == (8, 8)
    torch.testing.assert_close(plain.up.weight.float(), packed.up.weight.float(), rtol=2**-8, atol=1e-6)


@every_architecture
def test_sites_heads_and_what_trains(model_type: str) -> None:
    model = tiny_model(model_type)
    info = adapt(model, CONFIG, seed=1)
    assert list(info.sites) == SITES[model_type] and list(info.head_modules) == HEADS[model_type]
    assert_trainable(model, info)
    allowed = tuple(f"{site}.adakron_adapter." for site in info.sites) + tuple(f"{head}." for head in info.head_modules)
    logits(model).square().sum().backward()
    for name, parameter in model.named_parameters():
        trained = name.startswith(allowed)
        assert parameter.requires_grad == trained, name
        # Every adapter parameter is reached by the gradient and really moves; nothing frozen collects one.
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trained, name
    assert {type(model.get_submodule(site).base_layer).__name__ for site in info.sites} == {"Conv1D" if model_type == "gpt2" else "Linear"}


@every_architecture
def test_starts_near_the_backbone_and_disabling_gives_it_back(model_type: str) -> None:
    before = logits(tiny_model(model_type))
    model = tiny_model(model_type)
    adapt(model, CONFIG, seed=1)
    after = logits(model)
    assert not torch.equal(after, before)
    assert (after - before).norm() < 0.05 * before.norm()
    for module in model.modules():
        if isinstance(module, AdaptedLayer):
            module.enabled = False
    assert torch.equal(logits(model), before)


@every_architecture
def test_identity_start_is_bit_equal(model_type: str) -> None:
    model = tiny_model(model_type)
    adapt(model, AdapterConfig(bottleneck_dim=8, adapter_init="identity"), seed=1)
    assert torch.equal(logits(model), logits(tiny_model(model_type)))


def test_initial_values_depend_on_the_seed_only() -> None:
    def values(seed: int, global_seed: int) -> torch.Tensor:
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        model = tiny_model("bert")
        info = adapt(model, CONFIG, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        layers = [model.get_parameter(f"{site}.adakron_adapter.down_b.weight") for site in info.sites]
        assert not torch.equal(layers[0], layers[1])
        return torch.stack([*layers])

    assert torch.equal(values(1, global_seed=5), values(1, global_seed=6))
    assert not torch.equal(values(1, global_seed=5), values(2, global_seed=5))


def test_head_alone() -> None:
    model = tiny_model("roberta")
    info = adapt(model, AdapterConfig(method="head"), seed=0)
    assert info == AdaptedModelInfo((), ("classifier",))
    assert_trainable(model, info)
    assert torch.equal(logits(model), logits(tiny_model("roberta")))
    assert parameter_report(model, info).adapter == 0


@pytest.mark.parametrize(
    ("method", "tuned"),
    [
        *((method, tuned) for method in ("madakron", "madakron_partial", "adamix") for tuned in (False, True)),
        *((method, False) for method in ("pfeiffer", "houlsby")),  # without experts, and so without scores to tune
    ],
)
def test_methods_with_adapters_train_exactly_them_and_the_head(method: str, tuned: bool) -> None:
    has_experts = method in ("madakron", "madakron_partial", "adamix")
    model = tiny_model("bert")
    config = AdapterConfig(method=method, bottleneck_dim=8, init_std=0.5, tune_expert_scores=tuned).resolved()
    info = adapt(model, config, seed=1)
    assert_trainable(model, info)
    report = parameter_report(model, info)
    assert report.adapter == sum(expected_adapter_parameters(32, config) for _ in info.sites)
    assert report.total == sum(parameter.numel() for parameter in model.parameters())
    assert len(adapter_buffers(model, info)) == (0 if tuned or not has_experts else len(info.sites) * len(config.expert_projections))
    model.train()
    logits(model).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_experts_are_drawn_only_where_there_are_some() -> None:
    model = tiny_model("bert")
    adapt(model, CONFIG, seed=1)
    assert route_experts(model, 5) is None
    model = tiny_model("bert")
    adapt(model, AdapterConfig(method="madakron", bottleneck_dim=8, init_std=1.0), seed=1)
    model.train()
    router = route_experts(model, 5)
    assert router is not None

    def passes(pass_index: int) -> torch.Tensor:
        router.training_pass(0, 0, pass_index)
        return logits(model)

    model.config.hidden_dropout_prob = 0.0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert torch.equal(passes(0), passes(0))
    assert not torch.equal(passes(0), passes(1))
    layers = [module for module in model.modules() if isinstance(module, BottleneckAdapter)]
    assert [layer.site for layer in layers] == [0, 1]


def test_a_head_module_is_named_once() -> None:
    for names in ("classifier,classifier", "classifier,classifier.dense"):
        with pytest.raises(ConfigError, match="twice, by itself or inside another"):
            adapt(tiny_model("roberta"), AdapterConfig(head_modules=names), seed=0)


def test_one_expert_per_text_needs_sites_that_see_texts() -> None:
    mixture: dict[str, Any] = {"method": "madakron", "bottleneck_dim": 8}
    with pytest.raises(ConfigError, match=r"model\.decoder\.layers\.0\.fc2, .* --inference_level 0 or 3"):
        adapt(tiny_model("opt"), AdapterConfig(inference_level=1, **mixture), seed=0)
    model = tiny_model("opt")
    adapt(model, AdapterConfig(inference_level=1, position="attention", **mixture), seed=0)
    logits(model)
    model = tiny_model("opt")
    adapt(model, AdapterConfig(**mixture), seed=0)
    with pytest.raises(ConfigError, match="a row of its own"):
        set_inference_level(model, 1)


def test_two_passes_differ_through_dropout_or_experts_only() -> None:
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}

    def is_random(options: dict[str, Any], **adapter: Any) -> bool:
        model = tiny_model("bert", **options)
        adapt(model, AdapterConfig(bottleneck_dim=8, **adapter), seed=0)
        return is_random_in_training(model)

    assert is_random({}) and not is_random(quiet)
    assert is_random(quiet | {"attention_probs_dropout_prob": 0.1})  # attention reads it from the configuration
    assert is_random(quiet, method="madakron") and not is_random(quiet, method="madakron", tune_expert_scores=True)


DROPOUT = re.compile("dropout|pdrop|layerdrop")


@pytest.mark.parametrize("model_type", PLACEMENT)
def test_every_kind_of_randomness_is_known_and_no_other(model_type: str) -> None:
    # One rate at a time, those that the model does not use among them: GPT-2's summary_first_dropout is another head's.
    rates = [name for name, value in tiny_model(model_type).config.to_dict().items() if DROPOUT.search(name) and value != []]
    found = set()
    for name in (None, *rates):
        model = tiny_model(model_type, **(dict.fromkeys(rates, 0.0) | ({name: 0.5} if name else {}))).train()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            passes = [model(**tiny_batch()).logits for _ in range(6)]
        differ = any(not torch.equal(logits, passes[0]) for logits in passes)
        assert is_random_in_training(model) == differ, name
        found.add(differ)
    assert False in found


def test_bitfit_trains_biases_and_full_trains_everything() -> None:
    model = tiny_model("deberta")
    info = adapt(model, AdapterConfig(method="bitfit"), seed=0)
    assert_trainable(model, info)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name.endswith("bias") or name.startswith(("pooler.", "classifier."))), name
    assert any(name.endswith(("q_bias", "v_bias")) for name in info.tuned_parameters)
    report = parameter_report(model, info)
    assert report.adapter == 0 and 0 < report.tuned < report.backbone
    assert report.percent == pytest.approx(100 * report.tuned / report.backbone)

    model = tiny_model("gpt2")
    info = adapt(model, AdapterConfig(method="full"), seed=0, new_parameters=NewParameters(missing=("score.weight",)))
    assert all(parameter.requires_grad for parameter in model.parameters())
    report = parameter_report(model, info)
    assert report.tuned == report.backbone and report.trainable_percent == 100.0
    # What is missing from the checkpoint need not lie in the head where everything trains.
    adapt(tiny_model("bert"), AdapterConfig(method="full", head_modules="classifier"), seed=0, new_parameters=NewParameters(POOLER))


def test_bitfit_needs_biases() -> None:
    model = tiny_model("bert")
    for module in list(model.bert.modules()):
        for name, _ in list(module.named_parameters(recurse=False)):
            if name == "bias":
                module.register_parameter(name, None)
    with pytest.raises(ConfigError, match="method bitfit trains biases, and BertForSequenceClassification has none"):
        adapt(model, AdapterConfig(method="bitfit"), seed=0)


def test_methods_of_peft_are_attached_elsewhere() -> None:
    with pytest.raises(ConfigError, match=r"method 'lora' is none of adakron, .*adakron\.peft"):
        adapt(tiny_model("bert"), AdapterConfig(method="lora"), seed=0)


def test_checkpointed_activations_give_the_same_gradients_with_experts_and_two_passes() -> None:
    def gradients(checkpointed: bool) -> dict[str, torch.Tensor]:
        model = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        adapt(model, AdapterConfig(method="madakron", bottleneck_dim=8, init_std=0.5), seed=1)
        router = route_experts(model, 5)
        assert router is not None
        if checkpointed:
            checkpoint_activations(model, router)
        model.train()
        total = torch.zeros(())
        for pass_index in (0, 1):
            router.training_pass(3, 0, pass_index)
            total = total + (1 + pass_index) * logits(model).square().sum()
        total.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name)


def test_a_pooler_that_is_new_is_trained() -> None:
    model = tiny_model("bert")
    info = adapt(model, CONFIG, seed=0, new_parameters=NewParameters(missing=(*POOLER, "classifier.weight")))
    assert info.head_modules == ("classifier", "bert.pooler")
    assert model.get_parameter("bert.pooler.dense.weight").requires_grad
    assert_trainable(model, info)


def test_declared_heads_must_hold_every_parameter_that_is_missing_from_the_checkpoint() -> None:
    def heads(names: str, new: NewParameters) -> tuple[str, ...]:
        model = tiny_model("bert")
        info = adapt(model, AdapterConfig(bottleneck_dim=8, head_modules=names), seed=0, new_parameters=new)
        assert_trainable(model, info)
        return info.head_modules

    classifier = ("classifier.bias", "classifier.weight")
    with pytest.raises(ConfigError, match=r"head_modules \(bert.pooler\) leaves out classifier: .*classifier.bias.*--head_modules"):
        heads("bert.pooler", NewParameters(classifier))
    with pytest.raises(ConfigError, match=r"leaves out bert.pooler: .*bert.pooler.dense.bias"):
        heads("classifier", NewParameters((*POOLER, *classifier)))
    # A pooler that came with the checkpoint but was never used may stay as it is; so may a trained classifier.
    assert heads("classifier", NewParameters(classifier, unused=POOLER)) == ("classifier",)
    assert heads("bert.pooler", NewParameters()) == ("bert.pooler",)
    assert heads("bert.pooler, classifier", NewParameters((*POOLER, *classifier))) == ("bert.pooler", "classifier")


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("bottleneck_dim", [4_000_000_000_000, 4 * 10**30])
def test_adapters_larger_than_the_memory(device: str, bottleneck_dim: int) -> None:
    with torch.device(device):
        model = tiny_model("bert")
    with pytest.raises(ConfigError, match=r"behind 2 layers have [\d,]+ parameters and need [\d,]+ GiB.*--bottleneck_dim"):
        adapt(model, AdapterConfig(bottleneck_dim=bottleneck_dim), seed=0)
    assert find_sites(model) == SITES["bert"]  # untouched


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_head_stays_frozen(tied: bool) -> None:
    model = tiny_model("gpt2", auto_class="AutoModelForCausalLM", tie_word_embeddings=tied)
    info = adapt(model, CONFIG, seed=0)
    assert info.head_modules == () and list(info.sites) == SITES["gpt2"]
    assert_trainable(model, info)


@pytest.mark.parametrize(
    ("model_type", "options", "bottleneck_dim", "expected"),
    [
        ("bert", {}, 48, 599_232),
        (
            "roberta",
            {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096, "vocab_size": 50265},
            16,
            614_592,
        ),
        ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}, 8, 368_784),
    ],
)
def test_published_counts_on_full_size_models(model_type: str, options: dict[str, Any], bottleneck_dim: int, expected: int) -> None:
    config = AutoConfig.for_model(model_type, num_labels=3, **options)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
        info = adapt(model, AdapterConfig(bottleneck_dim=bottleneck_dim), seed=0)
    report = parameter_report(model, info)
    assert report.adapter == expected and report.sites == len(info.sites) == config.num_hidden_layers
    width = config.hidden_size
    assert report.head == {"bert": 3 * (width + 1), "roberta": width * (width + 1) + 3 * (width + 1), "gpt2": 3 * width}[model_type]
    assert report.adapter + report.head + report.backbone == sum(p.numel() for p in model.parameters())
    assert report.percent == pytest.approx(100 * expected / report.backbone)
    assert report.trainable_percent > report.percent * 0.9


def test_report_counts_partitioned_parameters() -> None:
    model = tiny_model("bert")
    info = adapt(model, CONFIG, seed=0)
    whole = parameter_report(model, info)
    for parameter in model.parameters():
        parameter.ds_numel = parameter.numel()  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    assert parameter_report(model, info) == whole
    assert whole.adapter == 2 * adapter_parameter_count(32, 8)


@every_architecture
def test_weight_decay_reaches_matrices_only(model_type: str) -> None:
    model = tiny_model(model_type)
    adapt(model, CONFIG, seed=0)
    decay, plain = trainable_groups(model, 0.1)
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    groups = {id(p): group for group, content in (("decay", decay), ("plain", plain)) for p in content["params"]}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(groups) == len(decay["params"]) + len(plain["params"]) == len(trained)
    for name, parameter in trained.items():
        assert groups[id(parameter)] == ("plain" if name.endswith("bias") else "decay"), name


def test_norms_and_stacked_biases_are_not_decayed_and_no_group_is_empty() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(4, 3))
            self.norm = nn.LayerNorm(3)

    groups = trainable_groups(Stack(), 0.1)
    assert [group["weight_decay"] for group in groups] == [0.0] and len(groups[0]["params"]) == 3


def test_verification_notices_a_backbone_that_trains_and_an_adapter_that_does_not() -> None:
    model = tiny_model("bert")
    info = adapt(model, CONFIG, seed=0)
    model.get_parameter("bert.embeddings.word_embeddings.weight").requires_grad_(True)
    model.get_parameter(f"{info.sites[0]}.adakron_adapter.up.bias").requires_grad_(False)
    with pytest.raises(ConfigError) as caught:
        assert_trainable(model, info)
    frozen, loose = caught.value.problems
    assert "frozen" in frozen and "layer.0.output.dense.adakron_adapter.up.bias" in frozen
    assert "backbone" in loose and "word_embeddings" in loose


def test_nothing_to_train() -> None:
    model = tiny_model("bert", auto_class="AutoModel")
    info = adapt(model, AdapterConfig(method="head"), seed=0)
    with pytest.raises(ConfigError, match=r"nothing would be trained: BertModel.*--method adakron"):
        assert_trainable(model, info)


def test_named_targets_and_placement_without_a_head() -> None:
    model = tiny_model("bert")
    pattern = r".*attention\.output\.dense|.*layer\.1\.intermediate\.dense"
    sites = find_sites(model, pattern)
    assert sites == [
        f"bert.encoder.layer.{tail}" for tail in ("0.attention.output.dense", "1.attention.output.dense", "1.intermediate.dense")
    ]
    info = adapt(model, AdapterConfig(bottleneck_dim=8, target_modules=pattern), seed=0)
    widths = [model.get_parameter(f"{site}.adakron_adapter.up.bias").numel() for site in info.sites]
    assert widths == [32, 32, 64]
    logits(model)
    assert find_sites(tiny_model("bert", auto_class="AutoModel")) == ["encoder.layer.0.output.dense", "encoder.layer.1.output.dense"]


def test_unknown_architecture_lists_candidates() -> None:
    config = AutoConfig.for_model(
        "gpt_neox", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(ConfigError) as caught:
        find_sites(model)
    message = str(caught.value)
    for part in ("'gpt_neox'", "known: bert, roberta", "--target_modules", "gpt_neox.layers.N.mlp.dense_4h_to_h"):
        assert part in message
    assert "score" not in message and "dense_h_to_4h" not in message  # the head, and a layer of another width
    assert find_sites(model, r".*\.dense_4h_to_h")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("output.dense", "'output.dense' matches no module of BertForSequenceClassification.*bert.encoder.layer.N.output.dense"),
        ("(", "is not a regular expression"),
        (r".*output\.LayerNorm", r"not linear layers: bert.encoder.layer.0.attention.output.LayerNorm \(LayerNorm\)"),
        ("classifier", "layers of the head.*classifier"),
    ],
)
def test_wrong_targets(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapt(tiny_model("bert"), AdapterConfig(bottleneck_dim=8, target_modules=pattern), seed=0)


def test_adapting_twice_is_an_error() -> None:
    model = tiny_model("bert")
    adapt(model, CONFIG, seed=0)
    with pytest.raises(ConfigError, match="already has adapters"):
        adapt(model, CONFIG, seed=0)


def test_settings_reach_the_adapters() -> None:
    model = tiny_model("gpt2", auto_class="AutoModelForCausalLM").bfloat16()
    config = AdapterConfig(bottleneck_dim=12, kron_factor=3, factor_order="b_major", activation="silu", init_std=0.5)
    adapter = model.get_submodule(adapt(model, config, seed=0).sites[0]).adakron_adapter
    assert isinstance(adapter, BottleneckAdapter)
    assert ((adapter.down_a.out_features, adapter.down_b.out_features), adapter.factor_order, adapter.activation) == (
        (3, 4),
        "b_major",
        "silu",
    )
    assert adapter.up.weight.dtype == torch.bfloat16 and adapter.up.weight.std().item() == pytest.approx(0.5, rel=0.2)
    assert model(**tiny_batch()).logits.isfinite().all()
