#!/bin/sh
# CPython loses a SIGINT that arrives before it runs the script, while it checks whether the path of the script is an archive. It prints
# KeyboardInterrupt, then runs the script and ends with exit code 0. A supervisor that stops a process by SIGINT right after its start waits
# for the whole grace period. Here a path hook sends the signal, because the time window is small. A signal of another process is lost too.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/sitecustomize.py" <<'PYTHON'
import signal, sys


def look_at(path):
    if path.endswith("script.py"):
        signal.raise_signal(signal.SIGINT)
    raise ImportError(path)


sys.path_hooks.insert(0, look_at)
PYTHON
echo 'print("the script runs")' > "$folder/script.py"

echo "version:  $(python3 -c 'import platform; print("CPython", platform.python_version())')"
echo "expected: the interpreter ends by SIGINT (exit code 130), and the script does not run"
code=0
output=$(PYTHONPATH="$folder" python3 "$folder/script.py" 2> "$folder/errors") || code=$?
echo "observed: exit code $code, output: $output, last line of standard error: $(tail -n 1 "$folder/errors")"
test "$code" = 0 || { echo "changed: the exit code is not 0"; exit 1; }
test "$output" = "the script runs" || { echo "changed: the script did not run"; exit 1; }
test "$(tail -n 1 "$folder/errors")" = KeyboardInterrupt || { echo "changed: no KeyboardInterrupt was printed"; exit 1; }
