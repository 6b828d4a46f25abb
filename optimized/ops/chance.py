"""Counter-based random numbers: a hash of who asks, so that they depend on no batch and on no history.

    z = seed * a + sequence * b + position * c + stream * d        wrapping int64
    splitmix64's finalizer, then the top 53 bits / 2^53

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from torch import Tensor


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


SEED = _signed(0x9E3779B97F4A7C15)
SEQUENCE = _signed(0xBF58476D1CE4E5B9)
POSITION = _signed(0x94D049BB133111EB)
STREAM = 0xD6E8FEB86659FD93


def uniform(seed: Tensor, sequence: Tensor, position: Tensor, stream: int) -> Tensor:
    """One number in [0, 1) for each (seed, sequence, position, stream).

    seed      [1]  int64
    sequence  [B]  int64
    position  [B] or [B, T]  int64
    ->        like position, float64
    """
    row = sequence.view(-1, *[1] * (position.dim() - 1))
    z = seed * SEED + row * SEQUENCE + position * POSITION + _signed(stream * STREAM % (1 << 64))
    z = (z ^ _shifted(z, 30)) * SEQUENCE
    z = (z ^ _shifted(z, 27)) * POSITION
    z = z ^ _shifted(z, 31)
    return _shifted(z, 11).double() * 2.0**-53


def _shifted(z: Tensor, bits: int) -> Tensor:
    # int64 shifts copy the sign; the mask makes the shift logical
    return (z >> bits) & ((1 << (64 - bits)) - 1)
