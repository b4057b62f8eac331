"""The key/value cache: what makes a token cost nearly the same, wherever it stands.

To write token n, a model needs the keys and values of all n tokens, in every layer. Those of the first n - 1 were
computed for the tokens before, and causal attention keeps them as they were: a token's keys never depend on what comes
later. So they are kept, and only the new token passes through the model. For n tokens that is n passes of one token
instead of n passes of up to n.

The room is taken once, for `rows` texts of `length` tokens, so nothing is copied as texts grow. Each row has its own
length: texts of different lengths are written in one batch, and a row can get a new text while the others go on.

    cache = KVCache(model.config, rows=2)
    logits, _ = model(prompts, cache=cache)          # (2, T): keys and values of T tokens are kept
    logits, _ = model(next_tokens, cache=cache)      # (2, 1): the same logits as from T + 1 tokens, up to rounding

Left out: pages (Kwon et al. 2023, arXiv:2309.06180), which let rows of unlike lengths share the room, and gradients.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogptx.device import free_memory

NEVER = 2**62  # where a key stands that is not there: in everyone's future


class KVCache:
    """Keys and values of up to `rows` texts of up to `length` tokens (the model's block_size if None).

    `lengths` (rows,) says how many tokens each row has seen; the others are keys and values (L, rows, H_kv, length, D).
    Give model(idx, cache=cache) B texts, and they are the first B rows; it calls `begin`, `update` in every layer, and
    `advance`. With `slide` a full row forgets its oldest token for each new one: attention then looks back at the last
    `length` tokens only, in every layer.
    ValueError when the model's positions do not allow the length, or the sliding, and when there is too little memory.
    """

    def __init__(
        self,
        config,
        rows: int,
        length: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        slide: bool = False,
    ):
        self.length, self.slide = length or config.block_size, slide
        check_reach(config, self.length, slide)
        shape = (config.n_layer, rows, config.n_kv_head, self.length, config.head_dim)
        need, free = 2 * math.prod(shape) * dtype.itemsize, free_memory(torch.device(device))
        if need > free:
            sizes = f"take {need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
            raise ValueError(f"keys and values of {rows} texts of {self.length} tokens {sizes}: write fewer at once")
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.lengths = torch.zeros(rows, dtype=torch.long)  # on the CPU, which has to decide by it
        self.counts: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """2 L rows H_kv length D numbers, as memory.kv_cache_bytes predicts."""
        return self.keys.nbytes + self.values.nbytes

    def reset(self, row: int | slice = slice(None)) -> None:
        """Forget the text of a row (of all rows, if none is named)."""
        self.lengths[row] = 0
        # subtle: a hidden key counts 0 times its value, and 0 times an infinity that a broken text left is not 0.
        self.keys[:, row] = self.values[:, row] = 0

    def resize(self, rows: int, length: int) -> None:
        """Take room for another number of texts and tokens, and keep what is in both; for a moment both are there.

        Not for a cache that slides: there the slot of a token depends on the length.
        """
        assert not self.slide
        more, longer = rows - len(self.lengths), length - self.length  # below 0 they cut off
        pad = (0, 0, 0, longer, 0, 0, 0, more)  # (L, rows, H_kv, length, D), from the last axis
        # All or nothing: there may be no memory for the second one.
        self.keys, self.values = F.pad(self.keys, pad), F.pad(self.values, pad)
        self.lengths, self.length = F.pad(self.lengths, (0, more)), length

    def part(self, rows: slice) -> "KVCache":
        """Some of the rows as a cache of their own, in the same memory."""
        part = copy.copy(self)
        part.lengths, part.keys, part.values = self.lengths[rows], self.keys[:, rows], self.values[:, rows]
        return part

    def move(self, source: int, target: int) -> None:
        """Let row `target` hold the text of row `source`, so that the texts that still grow can be the first rows."""
        self.lengths[target] = self.lengths[source]
        self.keys[:, target], self.values[:, target] = self.keys[:, source], self.values[:, source]

    def expect(self, counts: list[int]) -> None:
        """Announce that of the next chunk, padded on the right, only so many tokens are meant, row by row."""
        self.counts = torch.tensor(counts)

    def begin(self, B: int, T: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take in T more tokens of the first B rows; returns where they stand, (T,) or (B, T), and where keys stand.

        Those are (S,) or (B, S). The third is None where the T tokens are the last of S keys in every row, as attention
        expects it; otherwise a bias (B, 1, T, S) that is -inf for what a token must not see. ValueError when the chunk
        does not fit.
        """
        before, device = self.lengths[:B], self.keys.device
        counts, self.counts = torch.full((B,), T) if self.counts is None else self.counts, None
        assert len(before) == len(counts) == B, f"{B} texts for {len(self.lengths)} rows"
        self.after = before + counts  # (B,)
        self.check_room(counts)
        first = int(before[0])
        if bool((before == first).all()) and first + T <= self.length:
            # Padding is kept, too, behind what a row holds: nothing sees it before later tokens take its place.
            self.slots = slice(first, first + T)
            places = torch.arange(first + T, device=device)  # (S,)
            return places[first:], places, None
        new = torch.arange(T).expand(B, T)
        rows, columns = torch.nonzero(new < counts[:, None], as_tuple=True)  # of the N tokens that are not padding
        places = before[:, None] + new  # (B, T)
        self.slots = tuple(x.to(device) for x in (rows, columns, places[rows, columns] % self.length))
        self.S = min(self.length, int(self.after.max()))
        last = self.after[:, None] - 1
        keys = last - (last - torch.arange(self.S)) % self.length  # (B, S): each slot holds the latest that fits there
        keys = keys.masked_fill(keys < 0, NEVER)
        places = places.minimum(last.clamp(min=0))  # padding stands where the last token does, so that it exists
        places, keys = places.to(device), keys.to(device)
        hidden = torch.zeros(B, T, self.S, dtype=self.keys.dtype, device=device)
        hidden = hidden.masked_fill(keys[:, None, :] > places[:, :, None], -torch.inf)
        return places, keys, hidden[:, None]

    def check_room(self, counts: Tensor) -> None:
        """ValueError for the first row that its new tokens do not fit into."""
        for row in torch.nonzero(self.after > self.length)[:, 0].tolist():
            full = f"row {row} holds {int(self.lengths[row])} tokens and {self.length} fit, so {int(counts[row])} more"
            if not self.slide:
                raise ValueError(f"{full} do not: stop there, or give the cache more length, or let it slide")
            if counts[row] > 1:
                raise ValueError(f"{full} do not: once a window slides it takes one token at a time")

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a layer's new k and v (B, H_kv, T, D); returns all that its attention needs, (B, H_kv, S, D) each."""
        B, slots, both = len(k), self.slots, []
        for kept, new in ((self.keys[layer], k.detach()), (self.values[layer], v.detach())):
            if isinstance(slots, slice):
                kept[:B, :, slots] = new
                both.append(kept[:B, :, : slots.stop])
            else:
                rows, columns, places = slots
                kept[rows, :, places] = new[rows, :, columns].to(kept.dtype)  # (N, H_kv, D)
                both.append(kept[:B, :, : self.S])
        return both[0], both[1]

    def advance(self) -> None:
        """All layers have kept the new tokens: from now on they are old ones."""
        self.lengths[: len(self.after)] = self.after


def check_reach(config, length: int, slide: bool) -> None:
    """Raise ValueError unless texts may become so long with this model, and go on after that if they are to slide."""
    if config.position == "learned" and (slide or length > config.block_size):
        what = "after a window has slid" if slide else f"beyond block_size = {config.block_size}"
        raise ValueError(f"a model with learned positions has none {what}: stop there, or train one with rope or alibi")
    scaling = config.rope_scaling
    if scaling.kind == "dynamic" and (slide or length > scaling.original):
        raise ValueError(
            f"dynamic scaling changes what every earlier token was, for each token beyond {scaling.original}, so "
            "nothing can be kept: go on without a cache (--no-cache), or with ntk or yarn, which stay as they are"
        )
