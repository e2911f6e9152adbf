"""One place of a model with a choice of modules, looked up in every forward pass: one for all rows, or each row its own."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adakron.errors import ConfigError


@dataclass
class Selection:
    """Which adapter the next forward pass uses: one for all rows (None: the backbone), or groups of rows.

    groups: name -> row indices, int64, of a batch of `rows` rows of `tokens` tokens each; empty where all rows take `active`.
    """

    active: str | None = None
    groups: dict[str, Tensor] = field(default_factory=dict)
    rows: int = 0
    tokens: int = 0


class BankModule(nn.Module):
    """A choice of modules in one place of the model; rows whose adapter has none here go through the model's own.

    base_layer: the model's own module, where this replaces it (a head); None behind a layer, where rows pass unchanged.
    choices: by the adapters' keys in `keys`, name -> key, as a name may hold what a module's name may not.
    """

    def __init__(self, selection: Selection, base_layer: nn.Module | None = None):
        super().__init__()
        self.base_layer = base_layer
        self.choices = nn.ModuleDict()
        self.keys: dict[str, str] = {}
        self._selection = selection

    def put(self, name: str, key: str, module: nn.Module) -> None:
        """Let an adapter's rows go through a module."""
        self.keys[name] = key
        self.choices[key] = module

    def drop(self, name: str) -> None:
        """Take an adapter's module out, if it has one here."""
        if name in self.keys:
            del self.choices[self.keys.pop(name)]

    def _choice(self, name: str | None) -> nn.Module | None:
        return self.choices[self.keys[name]] if name in self.keys else self.base_layer

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """(rows, ...) -> (rows, ...), or both with (rows x tokens, width); narrower outputs are padded at the end with zeros.

        Where all rows take one module, inputs and outputs are whatever that has.
        """
        selection = self._selection
        if not selection.groups:
            module = self._choice(selection.active)
            return inputs[0] if module is None else module(*inputs, **options)
        if len(inputs) != 1 or any(isinstance(option, Tensor) for option in options.values()):
            raise ConfigError(
                f"{type(self.base_layer).__name__} takes more than one tensor, or takes it by name: its rows cannot be mixed; take one"
                " adapter per batch (use)"
            )
        x = inputs[0]
        parts: list[tuple[Tensor, Tensor]] = []
        for name, rows in selection.groups.items():
            index, module = self._places(x, rows), self._choice(name)
            part = x[index] if module is None else module(x[index], **options)
            if not isinstance(part, Tensor):
                raise ConfigError(
                    f"{type(module).__name__} returns a {type(part).__name__}: its rows cannot be mixed; take one adapter per batch (use)"
                )
            parts.append((index, part))
        first = parts[0][1]
        joined = first.new_zeros(len(x), *first.shape[1:-1], max(part.shape[-1] for _, part in parts))
        for index, part in parts:
            joined[index, ..., : part.shape[-1]] = part
        return joined

    def _places(self, x: Tensor, rows: Tensor) -> Tensor:
        selection = self._selection
        # A head may see one vector per row. Behind a layer, that many vectors are more likely some of the tokens (an expert's).
        if len(x) == selection.rows and (x.dim() > 2 or self.base_layer is not None):
            return rows
        # Some decoders flatten a batch before the feed-forward block; fewer vectors are those of a model that takes padding out.
        if x.dim() == 2 and len(x) == selection.rows * selection.tokens:
            return (rows[:, None] * selection.tokens + torch.arange(selection.tokens, device=rows.device)).flatten()
        raise ConfigError(
            f"a layer of this model sees shape {tuple(x.shape)} for a batch of {selection.rows} rows of {selection.tokens} tokens, so its"
            " rows cannot be told apart; take one adapter per batch (use)"
        )

    def extra_repr(self) -> str:
        """The adapters' names, for `print(model)`."""
        return ", ".join(f"{key}: {name}" for name, key in self.keys.items())
