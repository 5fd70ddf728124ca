#!/bin/sh
# Since PEP 475, CPython's functions try again when a signal handler has returned without an exception: os.read() of an eventfd does.
# os.eventfd_read() of the same eventfd raises InterruptedError.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/read.py" <<'PYTHON'
import os, platform, signal, sys, threading


def value_of(read):
    """What a read gives that a signal interrupts before there is a value."""
    descriptor = os.eventfd(0)
    handled = threading.Event()
    signal.signal(signal.SIGALRM, lambda *_: handled.set())

    def give():
        handled.wait(60)
        os.eventfd_write(descriptor, 7)

    giving = threading.Thread(target=give)
    giving.start()
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        return read(descriptor)
    except InterruptedError:
        return "InterruptedError"
    finally:
        giving.join()
        os.close(descriptor)


by_read = value_of(lambda descriptor: int.from_bytes(os.read(descriptor, 8), sys.byteorder))
by_eventfd_read = value_of(os.eventfd_read)
print("CPython", platform.python_version(), "on Linux", platform.release())
print("expected: both wait on after the handler, and give 7")
print("observed: os.read() gives", by_read, "and os.eventfd_read() gives", by_eventfd_read)
sys.exit((by_read, by_eventfd_read) != (7, "InterruptedError"))
PYTHON

python3 "$folder/read.py"
