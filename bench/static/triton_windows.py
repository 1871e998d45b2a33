"""Which tiles a launch with a sliding window visits: those that hold a pair of a query and a key that it sees.

From what a window is, and not from the kernels' loops: tests/bench/static/test_triton_counts.py holds these to it.
"""

from collections.abc import Iterable
from types import SimpleNamespace

Tile = tuple[int, int]  # its first column or query, and its width


def windowed(a: SimpleNamespace) -> bool:
    window = getattr(a, "window", None)
    return window is not None and window.first is not None


def meets(a: SimpleNamespace, queries: Tile, keys: Tile, prefix: bool = False) -> bool:
    """Whether one of the queries sees one of the own keys, or of the prefix's that a window's left bound hides too."""
    left, right, start = a.window
    right = 0 if a.CAUSAL else right
    rows, columns = inside(queries, a.L), inside(keys, a.P if prefix else a.S)
    if not rows or not columns:
        return False
    behind = a.P if prefix else 0
    past = left is not None and columns[-1] - behind < start + rows[0] - left
    ahead = not prefix and right is not None and columns[0] > start + rows[-1] + right
    return not past and not ahead


def inside(tile: Tile, end: int) -> range:
    return range(tile[0], min(tile[0] + tile[1], end))


def covered(tiles: Iterable[Tile], end: int) -> int:
    """How many of the first `end` columns or queries lie in one of the tiles."""
    return len({i for tile in tiles for i in inside(tile, end)})


def tiles_of(n: int, width: int) -> list[Tile]:
    return [(first, width) for first in range(0, n, width)]


def prefix_tiles(a: SimpleNamespace) -> list[Tile]:
    """As `rest` of call.py cuts the prefix, which has tiles of its own beside a window."""
    if not a.TAIL:
        return tiles_of(a.P, a.BLOCK_N) if a.REST_LOOP else []
    whole = a.P // a.BLOCK_N * a.BLOCK_N if a.REST_LOOP else 0
    return [*tiles_of(whole, a.BLOCK_N), (whole, a.TAIL)]


def keys_of(a: SimpleNamespace, queries: Tile, rest: bool = True) -> tuple[list[Tile], list[Tile]]:
    """The tiles of own keys that a tile of queries visits, and those of the prefix."""
    own = [tile for tile in tiles_of(a.S, a.BLOCK_N) if meets(a, queries, tile)]
    prefix = prefix_tiles(a) if rest else []
    if a.PREFIX_IN_WINDOW:
        prefix = [tile for tile in prefix if meets(a, queries, tile, prefix=True)]
    return own, prefix


def query_tiles(a: SimpleNamespace, query_tail: int) -> list[Tile]:
    if not query_tail:
        return tiles_of(a.L, a.BLOCK_M)
    whole = a.L // a.BLOCK_M * a.BLOCK_M
    return [*tiles_of(whole, a.BLOCK_M), (whole, query_tail)]


def queries_of(a: SimpleNamespace, keys: Tile, query_tail: int, prefix: bool = False) -> list[Tile]:
    """The tiles of queries that a tile of keys visits."""
    tiles = query_tiles(a, query_tail)
    if prefix and not a.PREFIX_IN_WINDOW:
        return tiles
    return [tile for tile in tiles if meets(a, tile, keys, prefix)]


def bytes_of_keys(a: SimpleNamespace, visited: Iterable[tuple[list[Tile], list[Tile]]], own: int, prefix: int) -> int:
    """Of so many bytes of own keys and values, and of the prefix's, what is read of them by all `visited` together."""
    found = list(visited)
    seen, seen_prefix = ([tile for tiles in found for tile in tiles[i]] for i in (0, 1))
    return own * covered(seen, a.S) // max(a.S, 1) + prefix * covered(seen_prefix, a.P) // max(a.P, 1)


def short_tiles(a: SimpleNamespace, queries: Tile) -> list[tuple[Tile, Tile]]:
    """The tiles of the virtual axis that a block of the short forward visits: the own keys and the prefix's of each."""
    found = []
    for i, first in enumerate(range(0, a.S + a.P, a.BLOCK_N)):
        W = a.BLOCK_N if i < a.TILES else a.TAIL
        own = min(max(a.S - first, 0), W)
        tile, rows = (first, own), (max(first - a.S, 0), W - own)
        hidden = a.PREFIX_IN_WINDOW and not meets(a, queries, rows, prefix=True)
        if meets(a, queries, tile) or (inside(rows, a.P) and not hidden):
            found.append((tile, rows))
    return found


def prefix_queries(a: SimpleNamespace, keys: Tile) -> int:
    """How many queries of a sample's head see a tile of the prefix: the first ones."""
    return sum(meets(a, (row, 1), keys, prefix=True) for row in range(a.L))


def fold_tiles(a: SimpleNamespace, block: int, first: int, end: int) -> list[Tile]:
    """The tiles of the prefix, between `first` and `end`, that a tile of all samples' queries visits."""
    rows = {i % a.L for i in inside((block * a.BLOCK_M, a.BLOCK_M), a.B * a.GROUP * a.L)}
    tiles = [(column, min(a.BLOCK_N, end - column)) for column in range(first, end, a.BLOCK_N)]
    return [tile for tile in tiles if any(meets(a, (row, 1), tile, prefix=True) for row in rows)]
