#!/bin/sh
# After os.fork(), CPython renews the ident of the main thread in the child, but not its native_id: threading.main_thread().native_id is the
# thread id of the parent. A program that passes it to sched_setaffinity(), setpriority() or tgkill() changes the parent.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/fork.py" <<'PYTHON'
import os, platform, threading

reader, writer = os.pipe()
pid = os.fork()
if pid == 0:
    main = threading.main_thread()
    same_thread = main is threading.current_thread() and main.ident == threading.get_ident()
    os.write(writer, f"{same_thread} {main.native_id} {threading.get_native_id()}".encode())
    os._exit(0)
os.waitpid(pid, 0)
same_thread, native_id, kernels_id = os.read(reader, 100).decode().split()

print("version:  CPython", platform.python_version(), "on Linux", platform.release())
print("expected: in the child, native_id of the main thread is the id that the kernel gives: True")
print(f"observed: {native_id == kernels_id}; it is the id of the parent: {int(native_id) == os.getpid()}")
assert same_thread == "True", "changed: the child runs in the main thread"
assert int(kernels_id) == pid, "changed: the kernel's id is the process id"
assert int(native_id) == os.getpid(), "changed: native_id is not the id of the parent"
PYTHON

python3 "$folder/fork.py"
