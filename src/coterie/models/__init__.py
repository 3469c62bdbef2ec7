"""Small, well-known networks to federate: what `[model] kind = "..."` names.

Each factory takes `input_shape` (of one example) and `outputs` from the experiment and its own options
from the config. Not here: your own models ("package.module:Class" in the config) and training of any
kind. Read `networks.py`, which is all of it.
"""

from collections.abc import Callable

from torch import nn

from coterie.models.networks import cnn, mcmahan_cnn, mlp, niid_cnn, softmax

MODELS: dict[str, Callable[..., nn.Module]] = {
    "softmax": softmax,
    "mlp": mlp,
    "cnn": cnn,
    "mcmahan_cnn": mcmahan_cnn,
    "niid_cnn": niid_cnn,
}

__all__ = ["MODELS", "cnn", "mcmahan_cnn", "mlp", "niid_cnn", "softmax"]
