"""What happens to an update between a client's training and the sum: clip, quantise, sparsify.

A transform is a `core.types.Transform`; how a chain of them joins an algorithm is `core.transforms`. Noise
is in `privacy`.
"""

from coterie.transforms.clip import adaptive_clip, clip

__all__ = ["adaptive_clip", "clip"]
