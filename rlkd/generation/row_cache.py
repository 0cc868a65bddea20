"""Keys and values of the rows of a batch, in buffers with room for the tokens to come."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

ROOM = 16
"""Columns that a buffer gets at first, and at least whenever it is full. More room would be read more slowly."""


def holds_rows(cache: DynamicCache) -> bool:
    """Whether all layers hold keys and values only, from which single rows can be removed.

    They cannot be removed from the state of linear-attention or state-space layers.
    """
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def spread(cache: DynamicCache, rows: Tensor, to_come: int) -> None:
    """Repeat the cache's rows in place: row i becomes a copy of the former row `rows[i]`, with room for more tokens.

    Args:
        rows: [B] int64, indices of the rows of a cache for which `holds_rows` is true.
        to_come: how many tokens a row may still get.
    """
    for index, layer in enumerate(cache.layers):
        # A layer that uses another one's keys and values never gets any.
        if isinstance(layer, DynamicLayer) and layer.is_initialized:
            cache.layers[index] = _RowLayer(layer, rows, to_come)


def keep(cache: DynamicCache, rows: Tensor) -> None:
    """Make row i what row `rows[i]` was, and expect only as many rows as there are in `rows` in the next step.

    Only rows that change are copied. So a row is removed at the price of one row if the last one takes its place.

    Args:
        rows: [B] int64; rows that change come from behind the first B.
    """
    targets = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(1)
    for layer in cache.layers:
        if isinstance(layer, _RowLayer):
            layer.move(rows[targets], targets)


class _RowLayer(CacheLayerMixin):
    """Like DynamicLayer or DynamicSlidingWindowLayer, but a step writes its keys and values in place.

    Those two copy everything that they hold in each step, and in addition whenever a row is removed.
    """

    def __init__(self, layer: DynamicLayer, rows: Tensor, to_come: int):
        """
        Args:
            layer: the keys and values of the prompts.
            rows: [B] int64, the row of `layer` that each row begins with.
            to_come: see `spread`.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_sliding = layer.is_sliding
        self.sliding_window: int | None = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        self._seen = layer.get_seq_length()
        self._longest = self._seen + to_come
        held = cast(tuple[Tensor, Tensor], (layer.keys, layer.values))
        self._columns = held[0].shape[-2]
        self._buffers = [_with_room(x, min(ROOM, to_come)).index_select(0, rows) for x in held]
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the constructor has the prompts."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **_: object) -> tuple[Tensor, Tensor]:
        """Append [B, heads, T, dim], and return the keys and values that these tokens attend to, [B, heads, …, dim]."""
        rows, new = key_states.shape[0], key_states.shape[-2]
        if self._columns + new > self._buffers[0].shape[-2]:
            self._make_room(rows, new)
        end = self._columns + new
        start = 0 if self.sliding_window is None else max(0, self._columns - self.sliding_window + 1)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:rows, :, self._columns : end] = states
        self.keys, self.values = (buffer[:rows, :, start:end] for buffer in self._buffers)
        self._columns, self._seen = end, self._seen + new
        return self.keys, self.values

    def _make_room(self, rows: int, new: int) -> None:
        """New buffers for the first `rows` rows, without what is outside the window."""
        start = 0 if self.sliding_window is None else max(0, self._columns - self.sliding_window + 1)
        kept = [buffer[:rows, :, start : self._columns] for buffer in self._buffers]
        self._columns -= start
        room = min(max(ROOM, self._columns // 2), self._longest - self._seen)
        self._buffers = [_with_room(x, max(new, room)) for x in kept]

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy rows `sources` to rows `targets`, each [N]."""
        for buffer in self._buffers:
            buffer.index_copy_(0, targets, buffer.index_select(0, sources))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns that `update` would return, position of the first of them)."""
        offset = 0 if self.sliding_window is None else max(0, self._seen - self.sliding_window + 1)
        return self._seen - offset + query_length, offset

    def get_seq_length(self) -> int:
        """Tokens seen so far, padding included."""
        return self._seen

    def get_max_length(self) -> int:
        """The window, or −1 without one."""
        return -1 if self.sliding_window is None else self.sliding_window


def _with_room(states: Tensor, room: int) -> Tensor:
    """A copy of [B, heads, T, dim] with `room` further columns of any value."""
    rows, heads, columns, width = states.shape
    buffer = torch.empty(rows, heads, columns + room, width, dtype=states.dtype, device=states.device)
    buffer[:, :, :columns] = states
    return buffer
