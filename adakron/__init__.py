"""AdaKron: frozen transformers fine-tuned with Kronecker-product adapters on DeepSpeed.

Where things are and who may import whom: the README beside this file.
"""

__version__ = "0.1.0"
