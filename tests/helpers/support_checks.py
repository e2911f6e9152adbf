"""What every method must do in every architecture: one function per property, which raises where it does not hold.

A check takes the model type and the settings of a method (arguments of AdapterConfig). `tests/unit/test_architectures.py` runs
every check that applies; `tests/helpers/support_matrix.py` makes a table of them.
"""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adakron.adapter_io import load_into, save_adapter
from adakron.errors import CheckpointError, ConfigError
from adakron.fingerprint import take_fingerprint
from adakron.models import adapt, adapter_buffers, checkpoint_activations, expected_adapter_parameters, route_experts
from adakron.nn import AdaptedLayer
from adakron.trainable import assert_trainable, parameter_report
from tests.helpers.adapted_models import (
    CLASSIFIER,
    WIDTH,
    Settings,
    adapted,
    config_of,
    disturb,
    expected_sites,
    gradients,
    has_adapters,
    last_norm,
    logits,
    plain,
    position_of,
    switch,
)
from tests.helpers.architectures import (
    DECODERS,
    ENCODER_DECODERS,
    FLAT_FFN,
    KEY_BIASES,
    WITHOUT_BIASES,
    WITHOUT_CHECKPOINTING,
    language_model_class,
    tiny_batch,
)


def check_sites(model_type: str, settings: Settings) -> None:
    """Adapters stand at exactly the expected layers, and exactly what is declared trains."""
    model, info = adapted(model_type, settings)
    present = [name for name, module in model.named_modules() if isinstance(module, AdaptedLayer)]
    expected = expected_sites(model_type, position_of(settings)) if has_adapters(settings) else []
    assert list(info.sites) == present == expected, info.sites
    assert info.head_modules
    assert_trainable(model, info)


def check_count(model_type: str, settings: Settings) -> None:
    """The adapters have as many trainable numbers as the closed form says, and the report adds up to the model."""
    model, info = adapted(model_type, settings)
    report = parameter_report(model, info)
    sites = len(expected_sites(model_type, position_of(settings))) if has_adapters(settings) else 0
    assert report.adapter == sites * expected_adapter_parameters(WIDTH, config_of(settings)), report
    assert report.total == sum(parameter.numel() for parameter in model.parameters())
    assert report.trainable == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def check_start(model_type: str, settings: Settings) -> None:
    """Adapters start near the backbone, but not at it; a method without adapters starts at it, bit for bit."""
    before = logits(plain(model_type))
    after = logits(adapted(model_type, settings)[0])
    if has_adapters(settings):
        change = float((after - before).norm() / before.norm())
        # Rounding alone is 1e-7.
        assert 1e-5 < change < 0.05, f"the logits change by {change:.1e} of their norm"
    else:
        assert torch.equal(after, before)


def check_identity(model_type: str, settings: Settings) -> None:
    """adapter_init identity leaves the logits as they were, bit for bit."""
    model, _ = adapted(model_type, {**settings, "adapter_init": "identity"})
    assert torch.equal(logits(model), logits(plain(model_type)))


def check_gradient(model_type: str, settings: Settings) -> None:
    """The gradient reaches every tensor of adapters, head and what else is tuned (but biases of attention keys), and nothing frozen."""
    model, info = adapted(model_type, {**settings, "init_std": 0.3} if has_adapters(settings) else settings)
    found = gradients(model)
    heads = [name for name, _ in model.named_parameters() if name.startswith(tuple(f"{head}." for head in info.head_modules))]
    reached = {*info.adapter_parameters, *heads}
    silent = [name for name in reached if name not in found or not found[name].any()]
    assert reached and not silent, f"no gradient reaches {silent}"
    sizes = {name: float(found[name].abs().max()) if name in found else 0.0 for name in info.tuned_parameters}
    # Rounding alone is 1e-7 of the largest, the smallest true gradient 1e-3.
    silent = [name for name, size in sizes.items() if size < 1e-5 * max(sizes.values())]
    expected = [name for name in sizes if model_type in KEY_BIASES and name.endswith(KEY_BIASES[model_type])]
    assert silent == expected, f"no gradient reaches {silent}"
    leaked = {*found} - reached - {*info.tuned_parameters}
    assert not leaked, f"frozen, but with a gradient: {leaked}"


def check_disabling(model_type: str, settings: Settings) -> None:
    """Adapters that are switched off leave the backbone, bit for bit; switched on again, they are as before."""
    model, _ = adapted(model_type, {**settings, "init_std": 0.3})
    on, backbone = logits(model), logits(plain(model_type))
    assert (on - backbone).norm() > 1e-3 * backbone.norm()
    switch(model, False)
    assert torch.equal(logits(model), backbone)
    switch(model, True)
    assert torch.equal(logits(model), on)


def check_saving(model_type: str, settings: Settings) -> None:
    """A saved folder, with the default head or a wider one, gives the same logits in a fresh backbone, bit for bit, and none in another."""
    head = adapted(model_type, settings)[1].head_modules
    for heads in (head, (*head, last_norm(model_type, head))):
        model = plain(model_type)
        fingerprint = take_fingerprint(model)
        adapter = config_of({**settings, "head_modules": None if heads == head else ",".join(heads)})
        info = adapt(model, adapter, seed=1)
        assert info.head_modules == heads
        before = logits(model)
        disturb(model)
        tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad} | adapter_buffers(model, info)
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(
                folder,
                tensors=tensors,
                adapter=adapter,
                info=info,
                base_model="tiny",
                auto_class=CLASSIFIER,
                model_options={"num_labels": 3, "id2label": {n: f"label {n}" for n in range(3)}},
                backbone=fingerprint,
            )
            fresh = plain(model_type)
            assert load_into(fresh, folder) == info
            assert torch.equal(logits(fresh), logits(model)) and not torch.equal(logits(fresh), before)
            refuses_another_backbone(model_type, folder, settings)


def refuses_another_backbone(model_type: str, folder: str, settings: Settings) -> None:
    """A backbone of the same shape whose matrices are others is refused, unless the folder brings them itself."""
    other = plain(model_type)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.1)
    try:
        load_into(other, folder)
    except CheckpointError as error:
        assert "was trained on another backbone" in str(error) and settings.get("method") != "full", error
        return
    assert settings.get("method") == "full", "another backbone is accepted"


def check_checkpointing(model_type: str, settings: Settings) -> None:
    """Activations that are computed again in the backward pass give equal gradients; a model that cannot do so says it."""
    model, _ = adapted(model_type, settings)
    router = route_experts(model, seed=3)
    if model_type in WITHOUT_CHECKPOINTING:
        try:
            checkpoint_activations(model, router)
        except ConfigError:
            return
        raise AssertionError(f"{model_type} can compute activations again; take it out of WITHOUT_CHECKPOINTING")
    calls = []
    for site in expected_sites(model_type, position_of(settings)):
        model.get_submodule(site).register_forward_pre_hook(lambda *_: calls.append(1))
    model.train()

    def run() -> tuple[dict[str, Tensor], int]:
        calls.clear()
        if router is not None:
            router.training_pass(0, 0)
        torch.manual_seed(0)
        return gradients(model, router), len(calls)

    stored, once = run()
    checkpoint_activations(model, router)
    again, twice = run()
    # A head alone needs no gradient of the layers; whether they run again is then a question of cost.
    assert once > 0 and (twice == 2 * once or settings.get("method") == "head"), (once, twice)
    assert stored.keys() == again.keys()
    # Rounding, and no more: without its cache a decoder takes other kernels, which on some processors round otherwise.
    scale = max(float(gradient.abs().max()) for gradient in stored.values())
    for name, gradient in stored.items():
        assert float((again[name] - gradient).abs().max()) <= 1e-5 * scale, name


def check_generation(model_type: str, settings: Settings) -> None:
    """generate() gives the same tokens and logits with and without the cache, and the adapters have a say in them."""
    model: Any = adapted(model_type, {**settings, "init_std": 0.3}, auto_class=language_model_class(model_type))[0]
    # In float64 what remains between the two is the float32 of some architectures' softmax, positions and norms.
    model.double()
    prompt = tiny_batch()["input_ids"][:2]

    def generate(**options: Any) -> tuple[Tensor, Tensor]:
        # Longer than the window of the architectures that have one.
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=6, min_new_tokens=6,
            output_logits=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
        return output.sequences, torch.stack(output.logits)

    tokens, cached = generate(use_cache=True)
    expected, uncached = generate(use_cache=False)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(cached, uncached, rtol=1e-5, atol=1e-5)
    switch(model, False)
    backbone = generate(use_cache=True)[1][0]
    assert (backbone - cached[0]).norm() > 1e-3 * backbone.norm()


def check_input(model_type: str, settings: Settings) -> None:
    """Adapters get (B, T, D), so that they see where a sentence ends; those behind the FFN of OPT get (B T, D)."""
    model, info = adapted(model_type, settings)
    shapes: dict[str, set[int]] = {site: set() for site in info.sites}
    for site in info.sites:
        adapter = model.get_submodule(f"{site}.adakron_adapter")
        adapter.register_forward_pre_hook(lambda _, given, site=site: shapes[site].add(given[0].dim()))
    logits(model)
    flat = {*expected_sites(model_type, "ffn")} if model_type in FLAT_FFN else set()
    assert shapes == {site: {2 if site in flat else 3} for site in info.sites}


def check_refusal(model_type: str, settings: Settings) -> None:
    """A method that has nothing to train says so."""
    try:
        adapted(model_type, settings)
    except ConfigError:
        return
    raise AssertionError(f"{model_type} accepts {settings}; take it out of WITHOUT_BIASES")


Check = Callable[[str, Settings], None]
CHECKS: dict[str, Check] = {
    "sites": check_sites,
    "count": check_count,
    "input": check_input,
    "start": check_start,
    "identity": check_identity,
    "gradient": check_gradient,
    "disabling": check_disabling,
    "saving": check_saving,
    "checkpointing": check_checkpointing,
    "generation": check_generation,
    "refusal": check_refusal,
}


def is_refused(model_type: str, settings: Settings) -> bool:
    """Whether the method has nothing to train in the architecture."""
    return settings.get("method") == "bitfit" and model_type in WITHOUT_BIASES


def applicable(model_type: str, settings: Settings) -> list[str]:
    """The checks that make sense for the architecture and the method."""
    if is_refused(model_type, settings):
        return ["refusal"]
    names = [name for name in CHECKS if name != "refusal"]
    if model_type not in (*DECODERS, *ENCODER_DECODERS):
        names.remove("generation")
    return [name for name in names if has_adapters(settings) or name not in ("input", "identity", "disabling", "generation")]
