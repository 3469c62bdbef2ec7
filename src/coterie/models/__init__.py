"""Small, well-known networks to federate: what `[model] kind = "..."` names.

Each factory takes `input_shape` (of one example) and `outputs` from the experiment and its own options
from the config. Also `GRU` and `LSTM`, torch's recurrent layers in a form that vectorises. Not here: your own
models ("package.module:Class" in the config) and training of any kind. Read `networks.py` first (images and
tables), then `sequence.py` (text).
"""

from collections.abc import Callable

from torch import nn

from coterie.models.networks import cnn, mcmahan_cnn, mlp, niid_cnn, softmax
from coterie.models.recurrent import GRU, LSTM
from coterie.models.sequence import CausalSelfAttention, char_gru, transformer

MODELS: dict[str, Callable[..., nn.Module]] = {
    "softmax": softmax,
    "mlp": mlp,
    "cnn": cnn,
    "mcmahan_cnn": mcmahan_cnn,
    "niid_cnn": niid_cnn,
    "char_gru": char_gru,
    "transformer": transformer,
}

__all__ = [
    "GRU",
    "LSTM",
    "MODELS",
    "CausalSelfAttention",
    "char_gru",
    "cnn",
    "mcmahan_cnn",
    "mlp",
    "niid_cnn",
    "softmax",
    "transformer",
]
