# One word per command. `just` lists them.

set shell := ["bash", "-euo", "pipefail", "-c"]

venv := ".venv"
python := env("PYTHON", "python3")
bin := justfile_directory() / venv / "bin"
programs := justfile_directory() / "target/programs/main"

_list:
    @just --list --unsorted

# the virtual environment with the package (editable) and every tool
setup:
    test -x {{ bin }}/python || {{ python }} -m venv {{ venv }}
    {{ bin }}/pip install --quiet --editable '.[dev]'

# format Rust and Python
fmt: setup
    cargo fmt --all
    {{ bin }}/ruff format .
    {{ bin }}/ruff check --quiet --fix .

# formatting, clippy, ruff, mypy, the stub against the native module, and the documentation with its internal links
lint: setup docs
    cargo fmt --all --check
    cargo clippy --workspace --all-targets --locked -- --deny warnings
    {{ bin }}/ruff format --check .
    {{ bin }}/ruff check .
    {{ bin }}/mypy
    {{ bin }}/python -m mypy.stubtest ferroelastic._rust

# the documentation, as HTML in target/docs; a warning or a broken internal link fails
docs: setup
    rm -rf target/docs
    {{ bin }}/python -m sphinx --quiet --fail-on-warning --keep-going --fresh-env --doctree-dir target/doctrees docs target/docs

# the external links of the documentation, through the network
docs-links: setup
    {{ bin }}/python -m sphinx --quiet --builder linkcheck --doctree-dir target/doctrees docs target/docs-links

# Slurm for the tests, unpacked in target/slurm and not installed. The tests get it themselves.
slurm:
    tests/support/unpack_slurm.sh target/slurm

# every test: the engine without Python, then the package, then what depends on pidfds once more without them
test: setup
    cargo test --locked --quiet
    {{ bin }}/python -m pytest
    FERROELASTIC_PIDFD=0 {{ bin }}/python -m pytest -m engine tests/integration tests/faults

# the tests that use torch on another version of it, in an environment of its own: just test-torch 2.15
test-torch version *options: setup
    {{ bin }}/python tests/torch_version.py {{ version }} {{ options }}

# the environment of the programs that use torch's launcher, at pinned versions
_programs: setup
    test -x {{ programs }}/bin/python || {{ python }} -m venv {{ programs }}
    {{ programs }}/bin/pip install --quiet --no-deps --requirement tests/programs/requirements.txt
    {{ programs }}/bin/pip install --quiet --no-deps --editable .
    # DeepSpeed compiles this operator at its first use on CPUs, for minutes
    PATH={{ programs }}/bin:$PATH DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR={{ programs }}/../extensions {{ programs }}/bin/python -c 'from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load(verbose=False)'

# programs that use torch's launcher, under torch's agent and under this package: prints a table
test-programs *options: _programs
    {{ bin }}/python -m pytest tests/programs {{ options }}

# the one abi3 wheel on the interpreters given, or on CPython 3.10 to 3.15 (PATH, pyenv, or Debian's unstable archive in target/sid): the tests that need no torch
test-wheel *interpreters: setup
    rm -rf target/wheels
    {{ bin }}/pip wheel --quiet --no-deps --wheel-dir target/wheels .
    cargo build --release --quiet --locked --package ferroelastic-zoo
    {{ bin }}/python tests/wheel_matrix.py target/wheels/*.whl {{ interpreters }}

# latencies of the engine
bench:
    cargo bench

# side by side with torchrun, in one run
bench-torchrun *options: setup
    {{ bin }}/python benches/against_torchrun.py {{ options }}

# restarts and first starts of torch workers: torchrun, ferrorun, and ferrorun with warm workers, in one run
bench-warm *options: setup
    {{ bin }}/python benches/warm.py {{ options }}

# time from the end of the last worker to the report of a failure
bench-failure-box *options: setup
    {{ bin }}/python benches/failure_box.py {{ options }}

# the end of a job whose standard error is full, and of one whose standard error is read
bench-full-console *options: setup
    {{ bin }}/python benches/full_console.py {{ options }}

# random faults to the agent, its guard and its workers: just campaign --number 1000
campaign *options: setup
    {{ bin }}/python -m tests.faults.campaign {{ options }}

# random faults to zygotes and parked workers: just warm-campaign --number 200
warm-campaign *options: setup
    {{ bin }}/python -m tests.faults.warm_campaign {{ options }}

# a table of jobs that were stopped in every state, by every signal; with --side torchrun the other one
stops *options: setup
    {{ bin }}/python -m tests.faults.stopping {{ options }}

# twenty failing scripts under ferrorun and torchrun: writes docs/failures-gallery.md
failures-table *options: setup
    {{ bin }}/python -m tests.acceptance.gallery {{ options }}

# Tee with patterns and rotation against plain tee
bench-log-options *options: setup
    {{ bin }}/python benches/log_options.py {{ options }}

# restarts of real trainings that come back, under both launchers
bench-restarts *options: setup
    {{ bin }}/python benches/restarts.py {{ options }}

# starts and restarts on a real Slurm: torchrun, ferrorun and scontrol requeue, in one run
bench-slurm *options: setup
    {{ bin }}/python benches/slurm.py {{ options }}

# launches by accelerate, with torch's agent and under ferrorun --exec
bench-accelerate *options: _programs
    {{ bin }}/python benches/against_accelerate.py {{ options }}

# the watchdog side by side with torch's, in one run
bench-timer *options: setup
    {{ bin }}/python benches/against_torch_timer.py {{ options }}

# the store side by side with torch's, in one run
bench-store *options: setup
    {{ bin }}/python benches/against_torch_store.py {{ options }}
