#!/bin/sh
# A pipe in packet mode (O_DIRECT) is full after one write per page, however short the writes are.
#
# Expected: a pipe of 256 KiB (F_SETPIPE_SZ, F_GETPIPE_SZ) takes 256 KiB, as one without O_DIRECT does. pipe(2) says of O_DIRECT that each
# write is a packet that one read returns. It does not say that a packet of one byte takes a page of the capacity.
# Observed: after 64 bytes in 64 writes the pipe is full (EAGAIN), 0.02 % of its capacity. FIONREAD reports 64. So a writer of short lines
# blocks 4,096 times earlier than the size of its pipe suggests.
#
# Exit status: 0 if the observed behaviour is the described one.
set -eu
uname -sr
python3 - <<'PYTHON'
import fcntl
import os
import struct
import sys
import termios

SIZE = 256 * 1024


def capacity(flags):
    """Bytes that the pipe takes in writes of one byte, its size, and the unread bytes that it reports."""
    reader, writer = os.pipe2(flags | os.O_NONBLOCK)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, SIZE)
    size, taken = fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ), 0
    try:
        while True:
            taken += os.write(writer, b"x")
    except BlockingIOError:
        pass
    (unread,) = struct.unpack("i", fcntl.ioctl(reader, termios.FIONREAD, b"\0" * 4))
    return taken, size, unread


page = os.sysconf("SC_PAGE_SIZE")
plain, packets = capacity(0), capacity(os.O_DIRECT)
print(f"size {plain[1]}, writes of 1 byte without O_DIRECT: {plain[0]} bytes taken")
print(f"size {packets[1]}, writes of 1 byte with O_DIRECT:    expected {SIZE}, observed {packets[0]} bytes taken, {packets[2]} unread")
sys.exit(not (plain[:2] == (SIZE, SIZE) and packets == (SIZE // page, SIZE, SIZE // page)))
PYTHON
