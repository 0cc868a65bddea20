"""Reads what W&B wrote offline: protobuf records in the log format of LevelDB, after a header of 7 bytes."""

from pathlib import Path

from wandb.proto import wandb_internal_pb2

_BLOCK = 32768
_FULL, _FIRST, _LAST = 1, 2, 4


def records(file: Path) -> list[wandb_internal_pb2.Record]:
    """The records of a `.wandb` file; a long one is in several parts."""
    data, found, part = file.read_bytes(), [], b""
    at = 7
    while at + 7 <= len(data):
        if _BLOCK - at % _BLOCK < 7:  # the rest of a block is too short for a header
            at += _BLOCK - at % _BLOCK
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part = (b"" if kind in (_FULL, _FIRST) else part) + data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (_FULL, _LAST):
            found.append(wandb_internal_pb2.Record.FromString(part))
    return found
