"""What every launch of a kernel needs to know: the row bucket, the tiles, the tables of angles."""

from torch import Tensor

from optimized.ops.angles import Angles
from optimized.ops.aten import Aten
from optimized.ops.tiles import BUCKETS, KeyTile, Tile, bucket, tile

# beyond the largest bucket a step is a prefill, where cuBLAS is at home and the chain rule asks nothing
PREFILL_FROM = BUCKETS[-1] + 1


class Launches:
    """`tile` and `key_tile` override the table, for tests that want many small blocks."""

    def __init__(self, num_rows: int = 16, tile: Tile | None = None, key_tile: KeyTile | None = None) -> None:
        self.bucket = bucket(num_rows)
        self._tile, self._key_tile = tile, key_tile
        self._prefill = Aten()
        self._angles = Angles()

    def _tile_of(self, num_out: int, weight: Tensor) -> Tile:
        return self._tile or tile(num_out, weight.shape[1], self.bucket, weight.element_size())
