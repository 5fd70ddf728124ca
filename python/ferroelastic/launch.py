"""``python -m ferroelastic.launch``: the launcher from before ``torchrun``, deprecated as torch's is.

Mirrors ``torch.distributed.launch``. It is :mod:`ferroelastic.run`, but gives each worker its local rank as an argument, ``--local-rank=N``,
unless there is ``--use-env``. Intended differences: those of :mod:`ferroelastic.run`.
"""

import warnings
from argparse import Namespace
from collections.abc import Sequence

from ferroelastic._usage import UsageError
from ferroelastic.run import console, get_args_parser, run

__all__ = ["get_args_parser", "launch", "main", "parse_args", "run"]

_DEPRECATION = (
    "ferroelastic.launch is deprecated, as torch.distributed.launch is; use ferrorun, which has --use-env set: let the script read its "
    "local rank from os.environ['LOCAL_RANK'] instead of the argument --local-rank"
)


def parse_args(args: Sequence[str] | None) -> Namespace:
    """Parse a command line; ``None`` is this process's.

    Raises:
        SystemExit: with code 2 after one line on standard error, if it cannot be parsed; with code 0 after ``--help``.
        ValueError: the variable of a flag holds no integer.
    """
    parser = get_args_parser()
    parser.add_argument(
        "--use-env",
        "--use_env",
        default=False,
        action="store_true",
        help="Do not give the script --local-rank; it reads LOCAL_RANK from its environment.",
    )
    return parser.parse_args(args)


def launch(args: Namespace) -> None:
    """Launch a job from a parsed command line, and wait for the workers of this node. See :func:`ferroelastic.run.run`.

    Raises:
        UsageError: ``--no-python`` without ``--use-env``, or another value that cannot work.
    """
    _check(args)
    run(args)


def main(args: Sequence[str] | None = None) -> None:
    """Launch a job from a command line, and wait for the workers of this node. Mirrors ``torch.distributed.launch.main``.

    Args:
        args: the command line without program; ``None`` is this process's.

    Raises:
        ChildFailedError: workers failed, and no restart was left.
        SignalException: this process was told to end; the workers were stopped.
        SystemExit: the command line cannot be parsed (code 2).
        UsageError: a value cannot work.
    """
    warnings.warn(_DEPRECATION, FutureWarning, stacklevel=2)
    launch(parse_args(args))


def _check(args: Namespace) -> None:
    if args.no_python and not args.use_env:
        raise UsageError(
            "When using the '--no-python' flag, you must also set the '--use-env' flag; a program of its own takes no --local-rank"
        )


def _parse(args: Sequence[str] | None) -> Namespace:
    parsed = parse_args(args)
    warnings.warn_explicit(_DEPRECATION, FutureWarning, "ferroelastic.launch", 1)
    _check(parsed)
    return parsed


if __name__ == "__main__":
    console(_parse)
