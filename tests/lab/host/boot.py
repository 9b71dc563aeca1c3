#!/usr/bin/env python3
"""boot.py LIMIT_S STALL_S LOG COMMAND...: runs QEMU, writes its serial console with times to LOG, passes on LAB lines.

Ends QEMU after LIMIT_S seconds, or when the console has been silent for STALL_S. QEMU's own status says nothing:
it is 0 even when dom0 crashed.
"""
import os
import select
import subprocess
import sys
import time

limit, stall, log, command = float(sys.argv[1]), float(sys.argv[2]), open(sys.argv[3], "wb"), sys.argv[4:]
start = last = time.time()
qemu = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
pending, why = b"", ""
while True:
    now = time.time()
    if now - start > limit:
        why = "time limit"
    elif now - last > stall:
        why = "silent"
    if why:
        break
    if not select.select([qemu.stdout], [], [], 1)[0]:
        continue
    data = os.read(qemu.stdout.fileno(), 65536)
    if not data:
        break
    last = time.time()
    pending += data
    *lines, pending = pending.split(b"\n")
    for line in lines:
        line = line.replace(b"\r", b"")
        log.write(b"[%8.2f] %s\n" % (last - start, line))
        log.flush()
        if line.startswith(b"LAB "):
            sys.stdout.buffer.write(line + b"\n")
            sys.stdout.buffer.flush()
if why:
    qemu.terminate()
try:
    qemu.wait(10)
except subprocess.TimeoutExpired:
    qemu.kill()
    qemu.wait()
log.write(b"[%8.2f] end of QEMU %s\n" % (time.time() - start, why.encode()))
if why:
    print("LAB boot ended:", why)
