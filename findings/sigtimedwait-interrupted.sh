#!/bin/sh
# CPython's signal.sigtimedwait() returns None when the timeout passes without a signal. If the process is suspended while it waits and is
# continued after the timeout, it returns a signal that never came.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/wait.py" <<'PYTHON'
import os, platform, signal, subprocess, sys, time

waiting = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print("ready", flush=True)
print(signal.sigtimedwait([signal.SIGTERM], 0.3), flush=True)
print(sorted(signal.sigpending()), flush=True)
"""


def wait(suspend):
    child = subprocess.Popen([sys.executable, "-c", waiting], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    if suspend:
        state = ""
        while state != "S":  # it sleeps in the system call
            with open(f"/proc/{child.pid}/stat") as stat:
                state = stat.read().rpartition(")")[2].split()[0]
        os.kill(child.pid, signal.SIGSTOP)
        time.sleep(1)  # longer than the timeout
        os.kill(child.pid, signal.SIGCONT)
    answer, pending = child.stdout.read().splitlines()
    child.wait()
    return answer, pending


print("version:  CPython", platform.python_version(), "on Linux", platform.release())
plain, _ = wait(suspend=False)
answer, pending = wait(suspend=True)
print("expected: None in both cases, because nobody sends SIGTERM")
print(f"observed: {plain} without a suspension; with one {answer}, and no signal is pending: {pending}")
assert plain == "None", "changed: the plain timeout"
assert answer.startswith("signal.struct_siginfo("), "changed: the interrupted wait returns None"
assert pending == "[]", "changed: a signal is pending"
PYTHON

python3 "$folder/wait.py"
