"""Mixtures of experts: what each pass uses, how the average is formed and kept, and that counters decide the draws."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adakron.errors import ConfigError
from adakron.nn import PROJECTIONS, BottleneckAdapter, Projection, Router, adapter_parameter_count

E, D, K = 3, 10, 12
DRAWN = [2, 0, 0, 1, 2, 0, 0, 2, 2, 2, 3, 2, 3, 2, 2, 2, 3, 0]


def mixture(bottleneck: Any = "kronecker", experts_in: tuple[str, ...] | None = None, **options: Any) -> BottleneckAdapter:
    """A float64 adapter all of whose numbers differ; experts in every projection unless named."""
    experts_in = PROJECTIONS[bottleneck] if experts_in is None else experts_in
    adapter = BottleneckAdapter(
        D, K, bottleneck=bottleneck, num_experts=E, experts_in=experts_in, dtype=torch.float64, expert_scores="random", **options
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(generator=generator)
    return adapter


def inputs(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 5)), D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def by_hand(adapter: BottleneckAdapter, x: Tensor, maps: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """The equation with one weight and bias for each projection."""
    if adapter.bottleneck == "plain":
        z = F.linear(x, *maps["down"])
    else:
        a, b = F.linear(x, *maps["down_a"]), F.linear(x, *maps["down_b"])
        z = (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2)
    return x + F.linear(F.gelu(z), *maps["up"])


def expert_maps(adapter: BottleneckAdapter, chosen: dict[str, int]) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: getattr(adapter, name).expert(chosen.get(name, 0)) for name in PROJECTIONS[adapter.bottleneck]}


class Fixed(Router):
    """Draws what it is told."""

    def __init__(self, chosen: dict[int, int]):
        super().__init__(0, 1)
        self.chosen = chosen

    def expert(self, site: int, slot: int, num_experts: int) -> int:
        return self.chosen.get(slot, 0)


@pytest.mark.parametrize("bottleneck", ["kronecker", "plain"])
@pytest.mark.parametrize("index", range(E))
def test_training_uses_one_expert_of_each_projection(bottleneck: str, index: int) -> None:
    adapter = mixture(bottleneck)
    names = PROJECTIONS[bottleneck]
    chosen = {slot: (index + slot) % E for slot in range(len(names))}
    adapter.router = Fixed(chosen)
    expected = by_hand(adapter, inputs(), expert_maps(adapter, dict(zip(names, chosen.values(), strict=True))))
    torch.testing.assert_close(adapter(inputs()), expected)
    adapter(inputs()).square().sum().backward()
    for slot, name in enumerate(names):
        gradient = adapter.get_parameter(f"{name}.weight").grad
        assert gradient is not None
        assert [bool(gradient[expert].any()) for expert in range(E)] == [expert == chosen[slot] for expert in range(E)]


@pytest.mark.parametrize("experts_in", [("down_a",), ("down_a", "down_b"), ("up",), ("down_a", "down_b", "up")])
def test_only_the_named_projections_have_experts(experts_in: tuple[str, ...]) -> None:
    adapter = mixture(experts_in=experts_in)
    shapes = {name: adapter.get_parameter(f"{name}.weight").dim() for name in PROJECTIONS["kronecker"]}
    assert shapes == {name: 3 if name in experts_in else 2 for name in PROJECTIONS["kronecker"]}
    assert {name for name, _ in adapter.named_buffers()} == {f"{name}.expert_scores" for name in experts_in}
    count = adapter_parameter_count(D, K, num_experts=E, experts_in=experts_in)
    assert sum(parameter.numel() for parameter in adapter.parameters()) == count
    tuned = mixture(experts_in=experts_in, tune_expert_scores=True)
    assert sum(p.numel() for p in tuned.parameters()) == count + E * len(experts_in)
    assert tuned.state_dict().keys() == adapter.state_dict().keys()


@pytest.mark.parametrize("bottleneck", ["kronecker", "plain"])
def test_evaluation_averages_by_the_softmax_of_the_scores(bottleneck: str) -> None:
    adapter = mixture(bottleneck).eval()
    maps = {}
    for name in PROJECTIONS[bottleneck]:
        projection = getattr(adapter, name)
        shares = [float(share) for share in projection.expert_scores.exp() / projection.expert_scores.exp().sum()]
        assert len({*shares}) == E
        maps[name] = tuple(sum(share * projection.expert(e)[part] for e, share in enumerate(shares)) for part in (0, 1))
    expected = by_hand(adapter, inputs(), maps)
    torch.testing.assert_close(adapter(inputs()), expected)
    with torch.no_grad():
        torch.testing.assert_close(adapter(inputs()), expected)


def test_the_average_is_computed_once_per_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    original = Projection._averaged
    monkeypatch.setattr(Projection, "_averaged", lambda self: (computed.append(self), original(self))[1])
    adapter = mixture().eval()
    with torch.no_grad():
        first = adapter(inputs())
        for _ in range(5):
            assert torch.equal(adapter(inputs()), first)
    assert len(computed) == 3  # one per projection
    with torch.inference_mode():
        adapter(inputs())
    assert len(computed) == 3


def in_place(adapter: BottleneckAdapter) -> None:
    with torch.no_grad():
        adapter.get_parameter("up.weight")[0] += 1.0


def new_data(adapter: BottleneckAdapter) -> None:
    parameter = adapter.get_parameter("up.weight")
    # The allocator soon hands out the first tensor's place again, unless somebody holds it.
    place = parameter.data_ptr()
    for _ in range(50):
        parameter.data = parameter.data + 1.0
        if parameter.data_ptr() == place:
            break


def new_parameter(adapter: BottleneckAdapter) -> None:
    adapter.up.bias = nn.Parameter(adapter.get_parameter("up.bias").detach() + 1.0)


def new_scores(adapter: BottleneckAdapter) -> None:
    adapter.get_buffer("up.expert_scores")[0] += 3.0


def assigned(adapter: BottleneckAdapter) -> None:
    adapter.load_state_dict({name: value + 1.0 for name, value in adapter.state_dict().items()}, assign=True)


def loaded(adapter: BottleneckAdapter) -> None:
    adapter.load_state_dict({name: value + 1.0 for name, value in adapter.state_dict().items()})


@pytest.mark.parametrize("inference_mode", [False, True])
@pytest.mark.parametrize("change", [in_place, new_data, new_parameter, new_scores, assigned, loaded])
def test_whatever_changes_the_parameters_is_noticed(change: Callable[[BottleneckAdapter], None], inference_mode: bool) -> None:
    adapter = mixture().eval()
    with torch.inference_mode(inference_mode), torch.no_grad():
        first = adapter(inputs())
    for _ in range(2):
        change(adapter)
        with torch.inference_mode(inference_mode), torch.no_grad():
            changed = adapter(inputs())
        with torch.no_grad():
            maps = {name: adapter.get_submodule(name)._averaged() for name in PROJECTIONS["kronecker"]}
        torch.testing.assert_close(changed, by_hand(adapter, inputs(), maps))
        assert not torch.allclose(changed, first)
        first = changed


def test_another_dtype_is_noticed() -> None:
    adapter = mixture().eval()
    with torch.no_grad():
        expected = adapter(inputs())
        for parameter in adapter.parameters():
            parameter.data = parameter.data.float()
        torch.testing.assert_close(adapter(inputs().float()), expected.float(), rtol=1e-3, atol=1e-3)
        assert adapter.to(torch.bfloat16)(inputs().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("mode", [True, False])
def test_what_leaves_no_trace_is_seen_after_train_or_eval(mode: bool) -> None:
    adapter = mixture().eval()
    with torch.no_grad():
        first = adapter(inputs())
        for parameter in adapter.parameters():
            parameter.data.copy_(parameter.data + 1.0)
        assert torch.equal(adapter(inputs()), first)  # the limit that the README names
        adapter.train(mode).eval()
        assert not torch.allclose(adapter(inputs()), first)


def test_partitioned_parameters_are_averaged_once_though_they_move(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    original = Projection._averaged
    monkeypatch.setattr(Projection, "_averaged", lambda self: (computed.append(self), original(self))[1])
    adapter = mixture().eval()
    for number, parameter in enumerate(adapter.parameters()):
        parameter.ds_id = number  # type: ignore[attr-defined]  # as ZeRO stage 3 marks them
    with torch.no_grad():
        for _ in range(3):
            for parameter in adapter.parameters():
                parameter.data = parameter.data.clone()
            adapter(inputs())
    assert len(computed) == 3


def test_an_average_made_in_inference_mode_serves_gradients_of_the_input() -> None:
    adapter = mixture().eval().requires_grad_(False)
    with torch.inference_mode():
        adapter(inputs())
    x = inputs().requires_grad_()
    adapter(x).sum().backward()
    assert x.grad is not None and x.grad.any()


def test_gradients_reach_experts_and_tuned_scores_through_the_average() -> None:
    adapter = mixture(tune_expert_scores=True)
    with torch.no_grad():
        adapter(inputs())
    adapter(inputs()).square().sum().backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad.flatten(1) if parameter.dim() > 1 else parameter.grad[:, None]).any(dim=1).all(), name
    # Trained scores mean no draws: training is evaluation.
    torch.testing.assert_close(adapter(inputs()), adapter.eval()(inputs()))


def test_draws_are_a_function_of_the_counters() -> None:
    def draws(router: Router, *position: int) -> list[int]:
        router.training_pass(*position)
        return [router.expert(site, slot, 4) for site in range(6) for slot in range(3)]

    router = Router(7, 6)
    here = draws(router, 3, 1, 0)
    assert draws(router, 3, 1, 0) == here == draws(Router(7, 6), 3, 1, 0)
    others = [draws(router, *position) for position in ((4, 1, 0), (3, 2, 0), (3, 1, 1))] + [draws(Router(8, 6), 3, 1, 0)]
    assert all(other != here for other in others) and len({tuple(other) for other in others}) == 4
    # Frozen: a resumed run must draw what the interrupted one would have.
    assert here == DRAWN
    many = [expert for step in range(2000) for expert in draws(router, step, 0, 0)]
    shares = [many.count(expert) / len(many) for expert in range(4)]
    assert all(abs(share - 0.25) < 0.01 for share in shares)


def test_without_a_router_the_global_generator_draws_anew_in_every_pass() -> None:
    adapter = mixture()
    torch.manual_seed(0)
    outputs = {tuple(adapter(inputs()).flatten().tolist()) for _ in range(40)}
    assert len(outputs) > 10
    torch.manual_seed(0)
    assert tuple(adapter(inputs()).flatten().tolist()) in outputs


def test_a_checkpointed_pass_uses_its_own_experts_again() -> None:
    adapter = mixture()
    router = adapter.router = Router(3, 1)
    contexts = router.checkpoint_contexts

    def gradients(checkpointed: bool) -> list[Tensor]:
        adapter.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for pass_index in (0, 1):
            router.training_pass(5, 0, pass_index)
            x = inputs().requires_grad_()
            y = checkpoint(adapter, x, use_reentrant=False, context_fn=contexts) if checkpointed else adapter(x)
            total = total + (pass_index + 1) * y.square().sum()
        router.training_pass(6, 0, 0)  # by the time of the backward pass the loop may have gone on
        total.backward()
        return [parameter.grad.clone() for parameter in adapter.parameters() if parameter.grad is not None]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("level", [0, 1])
def test_random_experts_in_evaluation(level: Any) -> None:
    adapter = mixture(experts_in=("down_a",), inference_level=level).eval()
    adapter.router = Router(1, 1)
    x = inputs(30, 4)
    adapter.router.evaluation_batch(0)
    y = adapter(x)
    singles = [by_hand(adapter, x, expert_maps(adapter, {"down_a": expert})) for expert in range(E)]
    match = torch.stack([torch.isclose(y, single).all(-1) for single in singles])  # (E, rows, tokens)
    assert (match.sum(0) == 1).all()
    chosen = match.int().argmax(0)
    assert {*chosen.flatten().tolist()} == {0, 1, 2}
    assert bool((chosen == chosen[:, :1]).all()) == (level == 1)
    # The same batch again gives the same, another one does not.
    adapter.router.evaluation_batch(0)
    assert torch.equal(adapter(x), y)
    adapter.router.evaluation_batch(1)
    assert not torch.equal(adapter(x), y)
    # A decoder's next token: its sentence keeps its expert, each token gets its own.
    adapter.router.evaluation_batch(0)
    adapter(x)
    again = adapter(x)
    assert torch.equal(again, y) == (level == 1)


def test_every_projection_can_choose_by_input() -> None:
    for bottleneck in PROJECTIONS:
        adapter = mixture(bottleneck, inference_level=0).eval()
        y = adapter(inputs(4, 3))
        for row in range(4):
            for token in range(3):
                x = inputs(4, 3)[row, token]
                names = PROJECTIONS[bottleneck]
                combinations = [
                    dict(zip(names, (code // E**i % E for i in range(len(names))), strict=True)) for code in range(E ** len(names))
                ]
                assert any(torch.allclose(by_hand(adapter, x, expert_maps(adapter, c)), y[row, token]) for c in combinations)


def test_sentences_need_a_dimension_of_their_own() -> None:
    with pytest.raises(ConfigError, match=r"inference_level 1 draws an expert per sentence.*\(5, 10\).*--inference_level 3 or 0"):
        mixture(inference_level=1).eval()(inputs(5))


def test_experts_start_apart_and_owe_nothing_to_the_global_generator() -> None:
    state = torch.get_rng_state()
    options: dict[str, Any] = {"num_experts": 4, "experts_in": ("down_a", "up"), "expert_scores": "random"}
    first = BottleneckAdapter(64, 16, **options, generator=torch.Generator().manual_seed(7))
    again = BottleneckAdapter(64, 16, **options, generator=torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    weight = first.get_parameter("up.weight")
    assert weight.std().item() == pytest.approx(0.02, rel=0.1) and not torch.equal(weight[0], weight[1])
    scores = first.get_buffer("up.expert_scores")
    assert (scores >= 0).all() and (scores < 1).all() and len({*scores.tolist()}) == 4
    x = torch.randn(3, 64)
    identity = BottleneckAdapter(64, 16, **options, init="identity")
    assert torch.equal(identity(x), x) and torch.equal(identity.eval()(x), x)


def test_wrong_expert_settings_are_named() -> None:
    for options, message in (
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_experts": 2}, "experts_in names no projection; choose among down_a, down_b, up"),
        ({"num_experts": 2, "experts_in": ("down",)}, "experts_in names down; a kronecker bottleneck has down_a, down_b, up"),
        ({"bottleneck": "plain", "num_experts": 2, "experts_in": ("down_a",)}, "a plain bottleneck has down, up"),
        ({"num_experts": 2, "experts_in": ("up", "down_a", "up")}, "experts_in is up, down_a, up; it must name a projection once"),
        ({"inference_level": 2}, "inference_level is 2; it must be one of 0, 1, 3"),
        ({"expert_scores": "ones"}, "expert_scores is 'ones'"),
        ({"bottleneck": "round"}, "bottleneck is 'round'"),
    ):
        with pytest.raises(ConfigError, match=message):
            BottleneckAdapter(16, 8, **options)  # type: ignore[arg-type]


def test_a_copy_of_a_mixture_works() -> None:
    adapter = mixture().eval()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(adapter)(inputs()), adapter(inputs()))


def test_a_plain_bottleneck_is_the_textbook_adapter() -> None:
    adapter = BottleneckAdapter(D, 7, bottleneck="plain", activation="relu", dtype=torch.float64)  # 7: no factors needed
    x = inputs()
    down, up = (adapter.get_submodule(name) for name in ("down", "up"))
    expected = x + F.linear(F.relu(F.linear(x, down.weight, down.bias)), up.weight, up.bias)
    torch.testing.assert_close(adapter(x), expected)
    assert sum(p.numel() for p in adapter.parameters()) == adapter_parameter_count(D, 7, bottleneck="plain") == (D + 1) * 7 + 8 * D
