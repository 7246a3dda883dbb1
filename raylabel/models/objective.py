"""What a search for a unit's concept minimises.

The objective of a distribution p over words has three terms, in nats: CE, the judge's cross-entropy on a unit's examples,
the classes weighing alike; H(p), its entropy; and KL(p ‖ q), q being the judge's own distribution of the word at the slot
(the mean over examples of log q). The last two are less independent than they look:

    c_kl KL(p ‖ q) + c_entropy H(p) = (c_entropy - c_kl) H(p) - c_kl E_p[log q]

With equal coefficients p's own spread has no price, and with c_kl above c_entropy spread is paid for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus


class Terms(NamedTuple):
    """The terms of the objective, each of any one shape."""

    cross_entropy: Tensor
    entropy: Tensor
    kl: Tensor

    def total(self, c_entropy: float, c_kl: float) -> Tensor:
        return self.cross_entropy + c_entropy * self.entropy + c_kl * self.kl


def example_loss(odds: Tensor, labels: Tensor, flip: float = 0.0) -> Tensor:
    """[...] of log-odds and truths: -log P(label), where a label is wrong with probability `flip`; 0 is cross-entropy."""
    signed = torch.where(labels, odds, -odds)
    if not flip:
        return softplus(-signed)
    return -(flip + (1 - 2 * flip) * signed.sigmoid()).log()


def class_weights(labels: Tensor) -> Tensor:
    """[examples] float32 that sum to 1, half for each label; all alike where only one occurs."""
    positive = labels.sum()
    negative = len(labels) - positive
    if positive == 0 or negative == 0:
        return torch.full(labels.shape, 1 / len(labels), device=labels.device)
    return torch.where(labels, 0.5 / positive, 0.5 / negative)


def regularisers(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """(H(p), KL(p ‖ q)) over the last dimension, of log-probabilities. q may be a part of a larger distribution."""
    p = log_p.exp()
    # A probability that underflows adds nothing, whatever its logarithm.
    own = torch.where(p > 0, p * log_p, 0.0).sum(-1)
    return -own, own - torch.where(p > 0, p * log_q, 0.0).sum(-1)
