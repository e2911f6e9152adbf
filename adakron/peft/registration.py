"""Make AdaKron a method that PEFT knows by name.

PEFT's `register_peft_method` takes outside methods, but only under a name that its closed enumeration `PeftType` has. The
enumeration is extended by hand here, and nowhere else.
"""

from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from adakron.adapter_folder import PEFT_TYPE
from adakron.errors import ConfigError


def type_of_method() -> PeftType:
    """PEFT's name for our method, a member of its enumeration from the first call on."""
    if PEFT_TYPE not in PeftType.__members__:
        # What the enumeration's own construction does for a member of a str enumeration. A plain string in PEFT's tables would
        # not do: transformers reads `peft_type.value`.
        member = str.__new__(PeftType, PEFT_TYPE)
        member._name_ = member._value_ = PEFT_TYPE
        # Past the enumeration's own __setattr__; from Python 3.12 on, members are plain attributes of the class.
        type.__setattr__(PeftType, PEFT_TYPE, member)
        PeftType._member_names_.append(PEFT_TYPE)
        PeftType._member_map_[PEFT_TYPE] = member
        PeftType._value2member_map_[PEFT_TYPE] = member
    return PeftType[PEFT_TYPE]


def register(config_class: Any, model_class: Any) -> None:
    """Register the method, once. ConfigError where PEFT has a method of this name that is not ours."""
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(type_of_method())
    if known is None:
        register_peft_method(name=PEFT_TYPE.lower(), config_cls=config_class, model_cls=model_class, prefix=model_class.prefix)
    elif known.__module__ != model_class.__module__:
        raise ConfigError(
            f"PEFT has a method {PEFT_TYPE} already, {known.__module__}.{known.__name__}; this release was written before that: use PEFT's"
            " own, or install a newer adakron"
        )
