"""Audits: attacks on what was released, and what their success proves. Functions of tensors; no experiment.

`record` is what an audit found. `canaries` audits with rows or updates of one's own, `membership` with the
run's data; `bounds` turns guesses into epsilon. `inversion` rebuilds inputs from one update, `labels` reads
the last layer's; `images` says how alike images are. Read `record` first, then `canaries`.
"""

from coterie.privacy.audits.canaries import many_runs, one_run
from coterie.privacy.audits.inversion import Reconstruction, deep_leakage, gradient_of, inverting
from coterie.privacy.audits.labels import infer_label, label_counts, linear_inputs
from coterie.privacy.audits.membership import likelihood_ratio, membership
from coterie.privacy.audits.record import Audit, to_html

__all__ = [
    "Audit", "Reconstruction", "deep_leakage", "gradient_of", "infer_label", "inverting", "label_counts",
    "likelihood_ratio", "linear_inputs", "many_runs", "membership", "one_run", "to_html",
]  # fmt: skip
