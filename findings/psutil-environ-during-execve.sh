#!/bin/sh
# psutil reads the environment and the command line of a living process of the same user. While the process executes a program, the kernel
# shows both as empty for a moment, and psutil returns an empty result, not an error. subprocess.Popen() can return within this moment.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet psutil==7.1.3

cat > "$folder/read.py" <<'PYTHON'
import os, platform, subprocess

import psutil

LOOKS = 20_000
# A shell that executes itself again and again: one process, with MARK in its environment at all times.
shell = 'exec sh -c "$0" "$0"'
child = subprocess.Popen(["sh", "-c", shell, shell], env={**os.environ, "MARK": "1"})
process = psutil.Process(child.pid)
marks, lines = 0, 0
try:
    for _ in range(LOOKS):
        marks += process.environ().get("MARK") == "1"
        lines += process.cmdline() != []
    alive = child.poll() is None
finally:
    child.kill()
    child.wait()

print("version:  psutil", psutil.__version__, "on Linux", platform.release())
print(f"expected: the variable {LOOKS} times and a command line {LOOKS} times")
print(f"observed: the variable {marks} times and a command line {lines} times, without an exception")
assert alive, "changed: the process has ended"
assert 0 < marks < LOOKS, "changed: psutil always or never sees the variable"
assert 0 < lines < LOOKS, "changed: psutil always or never sees the command line"
PYTHON

"$folder/venv/bin/python" "$folder/read.py"
