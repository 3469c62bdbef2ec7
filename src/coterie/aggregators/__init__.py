"""How replies become one aggregate: each rule is a monoid, so it streams, shards and nests. Knows core.

Read `mean` first. A linear rule holds O(model) memory; one that must see each reply (Krum) holds them all.
Weights are the algorithm's business, staleness the schedule's.
"""

from coterie.aggregators.krum import krum, krum_scores
from coterie.aggregators.mean import each, mean

__all__ = ["each", "krum", "krum_scores", "mean"]
