"""What the last layer's gradient tells without any search: labels, how many of each, and inputs.

The last layer is linear with a bias, the loss a mean cross-entropy over `batch` rows. Then the bias's
gradient is g = mean(p) - n / batch with p the predicted probabilities and n the counts of labels. An update
of several local steps is about lr times a sum of gradients: divide it by -lr * steps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def infer_label(bias: Tensor) -> int:
    """The label of a single row from the bias's gradient [classes]: the only entry that is negative.

    iDLG: Zhao, Mopuri, Bilen 2020, arXiv:2001.02610, equation 4.
    """
    return int(bias.argmin())


def label_counts(bias: Tensor, batch: int, predicted: Tensor | None = None) -> Tensor:
    """How many rows of a batch have each label: int64 [classes] that sum to `batch`.

    bias: its gradient [classes]. predicted: the mean of the model's probabilities on such data [classes];
    None: uniform, true of a model before training. Exact where `predicted` is, within 1 / (2 batch) each.
    """
    mean = torch.full_like(bias, 1 / len(bias)) if predicted is None else predicted
    wanted = (batch * (mean.double() - bias.double())).clamp(min=0)
    wanted *= batch / wanted.sum().clamp(min=1e-12)
    counts = wanted.floor().long()
    short = batch - int(counts.sum())
    counts[(wanted - counts).argsort(descending=True)[:short]] += 1  # the largest remainders
    return counts


def linear_inputs(weight: Tensor, bias: Tensor) -> Tensor:
    """The input [in] of a linear layer from its gradients [out, in] and [out] on a single row: exact.

    dL/dW = (dL/db) x^T, so any row of the one over that entry of the other is x (Phong et al. 2017, "privacy-
    preserving deep learning via additively homomorphic encryption", section 3). On a batch it is a mean of
    the inputs, weighed by dL/db.
    """
    row = int(bias.abs().argmax())
    return weight[row] / bias[row]
