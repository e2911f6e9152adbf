"""Exchange of adapters with the published implementations, AdaKron's and AdaMix's: their checkpoint files read and written.

Their names (ExpertSoup, MoA_A1, deepspeed_experts, ...) appear in this package and in the documentation only.
"""

from adakron.reference.base import base_name, find_tokenizer
from adakron.reference.exporting import EXPORT_FORMATS, Exported, export_checkpoint
from adakron.reference.files import write_checkpoint
from adakron.reference.importing import Imported, import_checkpoint
from adakron.reference.layout import Format, reorder_columns

__all__ = [
    "EXPORT_FORMATS",
    "Exported",
    "Format",
    "Imported",
    "base_name",
    "export_checkpoint",
    "find_tokenizer",
    "import_checkpoint",
    "reorder_columns",
    "write_checkpoint",
]
