"""Damage for the fuzzer: bytes, text, JSON and the containers whose check sums would otherwise stop it at the door."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

Damage = Callable[[bytes, random.Random], bytes]

_BYTES = (0x00, 0x01, 0x7F, 0x80, 0xFE, 0xFF)
_NUMBERS = (0, 1, 2, 255, 256, 32767, 32768, 65535, 65536, 10**6, 2**31 - 1, 2**31, 2**32 - 1)
_WORDS = (
    "",
    "0",
    "-1",
    "1e999",
    "nan",
    "-inf",
    "1_0",
    "9" * 400,
    "0x10",
    "null",
    "true",
    "{}",
    "[]",
    "[" * 3000,
    '{"a":' * 3000,
    "../../../../etc/passwd",
    "/etc/passwd",
    "a\0b",
    "x" * 300,
    "\ud800",
    "\ufeff",
    '"',
    ";",
    ",",
    "\n",
    "\r",
    "%s%n",
    "\u202e",
    "١٢",
)
_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3.5,
    2**31,
    10**5,
    10**7,
    10**12,
    10**400,
    float("nan"),
    float("inf"),
    -0.0,
    "",
    "text",
    "x" * 300,
    "a\0b",
    "../../x",
    "\ud800",
    [],
    {},
    [[]],
    [None],
    [1, "a"],
    {"a": 1},
    [0] * 1000,
)


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to a few changes: bits, bytes, numbers of 16 and 32 bits, cuts, copies and insertions."""
    changed = bytearray(data)
    for _ in range(_how_many(rng)):
        if not changed:
            changed = bytearray(rng.randbytes(rng.randrange(1, 64)))
        place = _place(len(changed), rng)
        kind = rng.randrange(9)
        if kind == 0:
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[place] = rng.choice(_BYTES)
        elif kind == 2:
            changed[place] = rng.randrange(256)
        elif kind == 3:
            value = rng.choice(_NUMBERS)
            order = rng.choice("<>")
            packed = struct.pack(order + "I", value) if rng.random() < 0.5 else struct.pack(order + "H", value & 0xFFFF)
            changed[place : place + len(packed)] = packed
        elif kind == 4:
            del changed[place:]
        elif kind == 5:
            del changed[place : place + rng.randrange(1, 32)]
        elif kind == 6:
            start = rng.randrange(len(changed))
            changed[place:place] = changed[start : start + rng.randrange(1, 64)]
        elif kind == 7:
            changed[place:place] = rng.randbytes(rng.randrange(1, 16))
        else:
            changed[place : place + rng.randrange(1, 64)] = bytes([rng.choice(_BYTES)]) * rng.randrange(1, 64)
    return bytes(changed)


def damage_text(data: bytes, rng: random.Random) -> bytes:
    """Words of a text swapped for awkward ones, repeated or dropped; sometimes the bytes themselves."""
    if rng.random() < 0.25:
        return damage_bytes(data, rng)
    text = data.decode("utf-8", "surrogateescape")
    for _ in range(_how_many(rng)):
        words = _split(text)
        place = rng.randrange(len(words))
        kind = rng.randrange(5)
        if kind == 0:
            words[place] = rng.choice(_WORDS)
        elif kind == 1:
            words[place] += rng.choice(_WORDS)
        elif kind == 2:
            del words[place]
        elif kind == 3:
            words[place:place] = words[rng.randrange(len(words)) :][: rng.randrange(1, 9)]
        else:
            other = rng.randrange(len(words))
            words[place], words[other] = words[other], words[place]
        text = "".join(words) or " "
    return text.encode("utf-8", "surrogatepass" if rng.random() < 0.5 else "replace")


def damage_json(data: bytes, rng: random.Random) -> bytes:
    """A document with a value somewhere in it replaced, removed, repeated or nested; sometimes the text itself."""
    if rng.random() < 0.2:
        return damage_text(data, rng)
    document = json.loads(data)
    for _ in range(_how_many(rng)):
        document = damage_value(document, rng)
    return json.dumps(document, ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass")


def damage_value(value: Any, rng: random.Random) -> Any:
    """A nested value of lists, dicts and scalars with one change somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        changed = dict(value)
        kind = rng.random()
        if kind < 0.1:
            del changed[key]
        elif kind < 0.15:
            changed[str(rng.choice(_WORDS))] = changed.pop(key)
        else:
            changed[key] = damage_value(value[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.75:
        place = rng.randrange(len(value))
        kind = rng.random()
        if kind < 0.1:
            return value[:place] + value[place + 1 :]
        if kind < 0.2:
            return value + value[place:]
        return [*value[:place], damage_value(value[place], rng), *value[place + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.4:
        return value * rng.choice((-1, 0, 2, 10, 1000)) + rng.choice((-1, 0, 1))
    chosen = rng.choice(_VALUES)
    return [value] if chosen == [[]] else chosen


def damage_png(data: bytes, rng: random.Random) -> bytes:
    """As [`damage_bytes`], with the check sums of the chunks made right again half of the time."""
    changed = damage_bytes(data, rng)
    return _right_png(changed) if rng.random() < 0.5 else changed


def _right_png(data: bytes) -> bytes:
    out, place = bytearray(data[:8]), 8
    while place + 12 <= len(data):
        length = struct.unpack(">I", data[place : place + 4])[0]
        body = data[place + 4 : place + 8 + length]
        if len(body) < 4 or place + 12 + length > len(data):
            break
        out += data[place : place + 4] + body + struct.pack(">I", zlib.crc32(body))
        place += 12 + length
    return bytes(out) + data[place:]


def damage_zip(data: bytes, rng: random.Random) -> bytes:
    """A zip with a damaged or renamed member and right check sums, or with damaged bytes."""
    if rng.random() < 0.3:
        return damage_bytes(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    weights = [4 if name.endswith((".pkl", ".npy")) else 1 for name, _ in members]
    place = rng.choices(range(len(members)), weights)[0]
    name, content = members[place]
    kind = rng.random()
    if kind < 0.08:
        del members[place]
    elif kind < 0.16:
        members[place] = (name[:-1] + rng.choice(("", "x", "/../../x")), content)
    elif kind < 0.22:
        members.append(members[place])
    else:
        members[place] = (name, damage_bytes(content, rng))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name or "x"), content)
    return stream.getvalue()


def damage_tensors(state: dict[str, Any], rng: random.Random) -> bytes:
    """A file of `torch.save` with some tensors of another kind; sometimes compressed, or with damaged bytes."""
    import torch

    changed = dict(state)
    for _ in range(_how_many(rng)):
        changed[rng.choice(list(changed))] = _other_tensor(torch, rng)
    stream = io.BytesIO()
    document = {"state_dict": changed} if rng.random() < 0.5 else changed
    torch.save(document, stream, _use_new_zipfile_serialization=rng.random() < 0.6)
    data = stream.getvalue()
    if data.startswith(b"PK") and rng.random() < 0.1:
        stream = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as packed:
            for member in archive.infolist():
                packed.writestr(member.filename, archive.read(member))
        data = stream.getvalue()
    if rng.random() < 0.2:
        data = (damage_zip if data.startswith(b"PK") else damage_bytes)(data, rng)
    return data


def _other_tensor(torch: Any, rng: random.Random) -> Any:
    """One of the ways in which a tensor can be odd."""
    kinds = (torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.bool, torch.int8, torch.int64)
    size = rng.choice((1, 3, 1000, 60_000, 10**6))
    plain = torch.ones(rng.choice((1, 6, 18, 64)))
    shape = rng.choice(((), (0,), (6,), (1, 0, 3), (3, 3, 1, 1), (2, 3, 7, 7), (4, 225, 7, 7), (1,) * 30))
    ways: tuple[Callable[[], Any], ...] = (
        lambda: torch.zeros(1).expand(size, size),
        lambda: torch.zeros(1).expand(4, 225, 7, 7),
        lambda: torch.zeros(70_000).as_strided((60_000, 9_000), (1, 1)),
        lambda: torch.empty(size, size, device="meta"),
        lambda: plain.to_sparse(),
        lambda: torch.eye(6).to_sparse_csr(),
        lambda: torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
        lambda: torch.nested.nested_tensor([plain, plain]),
        lambda: torch.full_like(plain, rng.choice((1e300, float("nan"), float("inf"), -1.0)), dtype=torch.float64),
        lambda: plain.to(rng.choice(kinds)),
        lambda: torch.nn.Parameter(plain),
        lambda: torch.zeros(shape),
        lambda: rng.choice(_VALUES[:-4]),
    )
    return rng.choice(ways)()


_YAML_VALUES = (
    "*a",
    "&a [*a]",
    "&a x",
    "!!python/object/apply:os.system [x]",
    "!!int x",
    "!!float {}",
    "!!binary /",
    "0o9",
    "1:59:59",
    "2001-99-99",
    ".nan",
    "-.inf",
    "~",
    "<<",
    "'",
    "|",
    ">-",
    "%",
    "--- x",
    "...",
    "\u2028",
    "9" * 5000,
    "0x" + "f" * 5000,
    *(word * deep for word in ("[", "{a: ", "? ", "- ", "!a ") for deep in (2, 9, 3000)),
    "[" * 3000 + "]" * 3000,
)


def damage_yaml(data: bytes, rng: random.Random) -> bytes:
    """A file of settings with a value that YAML reads in another way than one thinks, or as [`damage_text`]."""
    if rng.random() < 0.4:
        return damage_text(data, rng)
    lines = data.decode().splitlines()
    for _ in range(_how_many(rng)):
        place, value = rng.randrange(len(lines)), rng.choice(_YAML_VALUES)
        key = lines[place].partition(":")[0]
        lines[place] = rng.choice((f"{key}: {value}", value, f"{value}: 1", f"{lines[place]}\n<<: {value}"))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def damage_safetensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with a damaged header, with the right length before it, or with damaged bytes near its
    start."""
    length = struct.unpack("<Q", data[:8])[0]
    header, rest = data[8 : 8 + length], data[8 + length :]
    kind = rng.random()
    if kind < 0.6:
        header = damage_json(header, rng)
        return struct.pack("<Q", len(header)) + header + rest
    if kind < 0.8:
        return damage_bytes(data[: 8 + length], rng) + rest
    if kind < 0.9:
        return struct.pack("<Q", rng.choice((*_NUMBERS, 2**63, 2**64 - 1))) + header + rest
    return damage_bytes(data, rng)


def _how_many(rng: random.Random) -> int:
    return min(1 + int(rng.expovariate(0.7)), 8)


def _place(length: int, rng: random.Random) -> int:
    """Anywhere, but half of the time within the first 64 bytes, where headers are."""
    return rng.randrange(min(length, 64)) if rng.random() < 0.5 else rng.randrange(length)


def _split(text: str) -> list[str]:
    words, word = [], ""
    for letter in text:
        if letter in ',;\n\r\t "[]{}:|':
            words += [word, letter] if word else [letter]
            word = ""
        else:
            word += letter
    return [*words, word] if word or not words else words
