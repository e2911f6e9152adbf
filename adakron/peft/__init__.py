"""The bridge to PEFT, an optional extra (`pip install adakron[peft]`): importing it registers AdaKron as a PEFT method.

After `import adakron.peft`, a folder of ours loads with `PeftModel.from_pretrained(base, folder)` or transformers' own
`model.load_adapter(folder)`, `get_peft_model(model, AdaKronConfig(...))` trains AdaKron inside any trainer, and what those save
loads with `adakron.adapter_io.load_into`. The other direction, PEFT's methods in our trainer, is `adakron.peft.methods`.

Nothing else of this package imports peft. How the two meet, and what is refused: `docs/peft.md`.
"""

from adakron.peft.registration import register
from adakron.peft.settings import AdaKronConfig
from adakron.peft.tuner import AdaKronLayer, AdaKronModel

__all__ = ["AdaKronConfig", "AdaKronLayer", "AdaKronModel"]

register(AdaKronConfig, AdaKronModel)
