"""Writes safetensors files tensor by tensor; the library's own writer needs all tensors at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from rlkd.models.weights import TensorInfo

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(infos: Sequence[TensorInfo], tensors: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """Write the tensors to the safetensors file `path`: first the header, made of `infos`, then each at its place.

    The format (github.com/huggingface/safetensors): the length of the header in 8 bytes, the header in JSON, the data
    without gaps. Larger elements come first, so that each tensor is aligned.

    Raises: ValueError if `tensors` are not those that `infos` announced.
    """
    header: dict[str, dict[str, object]] = {"__metadata__": {"format": "pt"}}
    places: dict[str, tuple[TensorInfo, int]] = {}
    end = 0
    for info in sorted(infos, key=lambda info: -info.dtype.itemsize):
        places[info.name] = info, end
        offsets = [end, end := end + info.bytes]
        header[info.name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name, tensor in tensors:
            expected, at = places.pop(name)
            found = TensorInfo(name, tensor.dtype, tuple(tensor.shape))
            if found != expected:
                raise ValueError(f"expected {expected}, got {found}")
            file.seek(8 + len(text) + at)
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            del tensor  # before the next one is gathered
    if places:
        raise ValueError(f"expected {len(infos)} tensors, got none of the name {min(places)}")


def write_checkpoint(
    infos: Sequence[TensorInfo], tensors: Iterable[tuple[str, Tensor]], folder: Path, largest: int = 50 * 10**9
) -> None:
    """Write the tensors, which come in the order of `infos`, as Hugging Face does: model.safetensors, or several files
    with an index.

    Args:
        largest: bytes of a file, unless one tensor has more.
    """
    files: list[list[TensorInfo]] = [[]]
    size = 0
    for info in infos:
        if files[-1] and size + info.bytes > largest:
            files.append([])
            size = 0
        files[-1].append(info)
        size += info.bytes
    left = iter(tensors)
    if len(files) == 1:
        write_tensors(infos, left, folder / "model.safetensors")
        return
    where: dict[str, str] = {}
    for number, part in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        write_tensors(part, islice(left, len(part)), folder / name)
        where |= {info.name: name for info in part}
    index = {"metadata": {"total_size": sum(info.bytes for info in infos)}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
