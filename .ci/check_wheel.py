"""check_wheel.py WHEEL MEGABYTES: a wheel is smaller than that; if not, what is large in it, as it is compressed."""

import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

SHOWN = 8


def sections(binary: bytes) -> Iterator[tuple[str, bytes]]:
    """The names and bytes of the sections of an ELF file of 64 bits, in the byte order of this machine."""
    if not binary.startswith(b"\x7fELF\x02"):
        return
    at, size, count, names = struct.unpack_from("=40xQ10x3H", binary)
    headers = [struct.unpack_from("=II16xQQ", binary, at + k * size) for k in range(count)]
    label = headers[names][2]
    for name, kind, start, length in headers:
        if kind not in (0, 8):  # without contents
            yield binary[label + name :].partition(b"\0")[0].decode(), binary[start : start + length]


def parts(wheel: zipfile.ZipFile) -> Iterator[tuple[int, str]]:
    for item in wheel.infolist():
        yield item.compress_size, item.filename
        for name, contents in sections(wheel.read(item)):
            yield len(zlib.compress(contents)), f"{item.filename} {name}"


def main(path: Path, megabytes: float) -> str | None:
    size = path.stat().st_size
    print(f"{path.name}: {size / 1e6:.2f} MB, the limit is {megabytes:g}")
    if size < 1e6 * megabytes:
        return None
    with zipfile.ZipFile(path) as wheel:
        largest = sorted(parts(wheel), reverse=True)[:SHOWN]
    return "\n".join(f"{size / 1e6:8.2f} MB  {name}" for size, name in largest)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2])))
