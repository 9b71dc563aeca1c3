#!/usr/bin/env python3
"""extract-vmlinux.py BZIMAGE OUT: takes the kernel ELF out of a bzImage.

A kernel that need not unpack itself saves 3 s in dom0 and 4 s in each guest under emulation.
"""
import lzma
import struct
import subprocess
import sys
import zlib

image = open(sys.argv[1], "rb").read()
assert image[0x202:0x206] == b"HdrS", "not a bzImage"
setup_sectors = image[0x1F1] or 4
offset, length = struct.unpack_from("<II", image, 0x248)  # payload_offset, payload_length
start = (setup_sectors + 1) * 512 + offset
payload = image[start : start + length]
if payload[:6] == b"\xfd7zXZ\0":
    elf = lzma.LZMADecompressor().decompress(payload)
elif payload[:2] == b"\x1f\x8b":
    elf = zlib.decompressobj(31).decompress(payload)
elif payload[:4] == b"\x28\xb5\x2f\xfd":
    elf = subprocess.run(["zstd", "-dc"], input=payload, stdout=subprocess.PIPE).stdout
else:
    sys.exit("unknown compression of the kernel's payload")
assert elf[:4] == b"\x7fELF", "no ELF in the payload"
open(sys.argv[2], "wb").write(elf)
