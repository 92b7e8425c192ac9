"""Keys and values of the sequences in a batch, one place a sequence, for the models of transformers.

    cache = SlotCache(max_tokens=128)
    cache.reserve(n_places=4, n_tokens=64)
    cache.aim(first=0, starts=[12, 3, 40], n_tokens=1, device="cpu")     # the next pass appends to places 0, 1 and 2
    model(..., past_key_values=cache)

transformers' own caches append one column to all rows of a batch, so rows must be padded to one length and a row that
joins or leaves means copying all of them. Here each place has its own length, and only as many columns are read as the
longest row needs. A place that is given up is zeroed: a masked value still enters the sum with weight 0, and 0 times
the infinity that a broken sequence left would be NaN in somebody else's row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

_ROUND_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class _Aim:
    """Rows first .. first + len(starts) - 1 take n_tokens each, from column starts[b] on; end is the last one's end."""

    first: int
    starts: tuple[int, ...]
    n_tokens: int
    end: int
    row_B: Tensor
    start_B: Tensor


class SlotCache(Cache):
    """A transformers Cache with a place for each sequence. It learns the number of layers and heads from use."""

    def __init__(self, max_tokens: int) -> None:
        super().__init__(layer_class_to_replicate=_Layer)
        self.max_tokens = max_tokens
        self.n_places = 0
        self.n_tokens = 0
        self._written: dict[int, int] = {}
        """Place -> how many of its columns were written, pads included."""
        self._aim: _Aim | None = None

    def sizes(self, *, n_places: int, n_tokens: int) -> tuple[int, int]:
        """How many places and columns there will be once so many are reserved: rounded up, so that growing is rare."""
        places = max(self.n_places, 1 << (n_places - 1).bit_length())
        tokens = max(self.n_tokens, min(-(-n_tokens // _ROUND_TOKENS) * _ROUND_TOKENS, max(n_tokens, self.max_tokens)))
        return places, tokens

    def reserve(self, *, n_places: int, n_tokens: int) -> None:
        """Make room; what is there stays. The memory is taken by the next forward pass."""
        self.n_places, self.n_tokens = self.sizes(n_places=n_places, n_tokens=n_tokens)

    def aim(self, *, first: int, starts: Sequence[int], n_tokens: int, device: torch.device | str) -> None:
        """Where the next forward pass, over len(starts) rows of n_tokens, puts its keys and values."""
        start_B = torch.tensor(starts, device=device)
        row_B = torch.arange(first, first + len(starts), device=device)
        end = max(starts) + n_tokens
        self.reserve(n_places=first + len(starts), n_tokens=end)
        for place, start in enumerate(starts, first):
            self._written[place] = max(self._written.get(place, 0), start + n_tokens)
        self._aim = _Aim(first=first, starts=tuple(starts), n_tokens=n_tokens, end=end, row_B=row_B, start_B=start_B)

    def move(self, source: int, target: int) -> None:
        """The sequence at `source` goes on at `target`, which was given up; its old place is given up too."""
        n_tokens = self._written.get(source, 0)
        for layer in self.layers:
            layer.copy(source, target, n_tokens)
        self._written[target] = n_tokens
        self.give_up(source)

    def give_up(self, place: int) -> None:
        """Zero what a sequence left at its place."""
        n_tokens = self._written.pop(place, 0)
        for layer in self.layers:
            layer.zero(place, n_tokens)

    def clear(self) -> None:
        """Give all memory back; for when no sequence is in the batch."""
        self.layers.clear()
        self._written.clear()
        self.n_places = self.n_tokens = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        while len(self.layers) <= layer_idx:
            self.layers.append(_Layer())
        assert self._aim is not None, "aim the cache before the forward pass"
        return self.layers[layer_idx].put(key_states, value_states, self._aim, self.n_places, self.n_tokens)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """transformers asks it to count positions, which we give, and to build masks, which we give too."""
        return 0


class _Layer(CacheLayerMixin):
    """Keys and values [places, heads, tokens, head size] of one layer."""

    is_sliding = False
    keys: Tensor | None
    values: Tensor | None

    def put(
        self, key_BHTD: Tensor, value_BHTD: Tensor, aim: _Aim, n_places: int, n_tokens: int
    ) -> tuple[Tensor, Tensor]:
        self.keys = _with_room(self.keys, key_BHTD, n_places, n_tokens)
        self.values = _with_room(self.values, value_BHTD, n_places, n_tokens)
        self.is_initialized = True
        last = aim.first + len(aim.starts)
        for held, new_BHTD in ((self.keys, key_BHTD), (self.values, value_BHTD)):
            if aim.n_tokens == 1:
                held[aim.row_B, :, aim.start_B] = new_BHTD[:, :, 0]
            elif len(set(aim.starts)) == 1:
                held[aim.first : last, :, aim.starts[0] : aim.end] = new_BHTD
            else:
                for b, start in enumerate(aim.starts):
                    held[aim.first + b, :, start : start + aim.n_tokens] = new_BHTD[b]
        return self.keys[aim.first : last, :, : aim.end], self.values[aim.first : last, :, : aim.end]

    def copy(self, source: int, target: int, n_tokens: int) -> None:
        for held in (self.keys, self.values):
            assert held is not None
            held[target, :, :n_tokens] = held[source, :, :n_tokens]

    def zero(self, place: int, n_tokens: int) -> None:
        for held in (self.keys, self.values):
            assert held is not None
            held[place, :, :n_tokens] = 0

    # What transformers' base class demands, and never calls where masks and positions are given.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotImplementedError

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


def _with_room(held: Tensor | None, like_BHTD: Tensor, n_places: int, n_tokens: int) -> Tensor:
    """`held`, or a larger one that begins with it."""
    if held is not None and held.shape[0] >= n_places and held.shape[2] >= n_tokens:
        return held
    _, n_heads, _, head_size = like_BHTD.shape
    if held is None:
        return like_BHTD.new_zeros(n_places, n_heads, n_tokens, head_size)
    grown = held.new_zeros(max(n_places, held.shape[0]), n_heads, max(n_tokens, held.shape[2]), head_size)
    grown[: held.shape[0], :, : held.shape[2]] = held
    return grown
