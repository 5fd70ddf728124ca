"""``python -m ferroelastic.launch``: the predecessor of ``torchrun``, deprecated as torch's is.

Mirrors ``torch.distributed.launch``. It works as :mod:`ferroelastic.run`, but passes the local rank to each worker as an argument,
``--local-rank=N``, unless ``--use-env`` is given. Intended differences: those of :mod:`ferroelastic.run`.
"""

import warnings
from argparse import Namespace
from collections.abc import Sequence

from ferroelastic._usage import UsageError
from ferroelastic.run import console, get_args_parser, run

__all__ = ["get_args_parser", "launch", "main", "parse_args", "run"]

_DEPRECATION = (
    "ferroelastic.launch is deprecated, as torch.distributed.launch is; use ferrorun, which implies --use-env: the script must read the "
    "local rank from os.environ['LOCAL_RANK'] instead of the argument --local-rank"
)


def parse_args(args: Sequence[str] | None) -> Namespace:
    """Parse a command line.

    Args:
        args: the command line without the program; ``None`` parses that of this process.

    Raises:
        SystemExit: the command line cannot be parsed (code 2, after one line on standard error), or it has ``--help`` (code 0).
        ValueError: the value of a flag's ``PET_*`` variable is not an integer.
    """
    parser = get_args_parser()
    parser.add_argument(
        "--use-env",
        "--use_env",
        default=False,
        action="store_true",
        help="Do not pass --local-rank to the script, which reads LOCAL_RANK from its environment.",
    )
    return parser.parse_args(args)


def launch(args: Namespace) -> None:
    """Launch a job from a parsed command line, and wait for the workers of this node. See :func:`ferroelastic.run.run`.

    Args:
        args: as returned by :func:`parse_args`. Modified in place.

    Raises:
        UsageError: ``--no-python`` without ``--use-env``, or another invalid value.
    """
    _check(args)
    run(args)


def main(args: Sequence[str] | None = None) -> None:
    """Launch a job from a command line, and wait for the workers of this node. Mirrors ``torch.distributed.launch.main``.

    Args:
        args: the command line without the program; ``None`` takes that of this process.

    Raises:
        ChildFailedError: workers failed and no restart was left.
        SignalException: this process received a terminating signal. The workers were stopped.
        SystemExit: the command line cannot be parsed (code 2).
        UsageError: a value is invalid.
    """
    warnings.warn(_DEPRECATION, FutureWarning, stacklevel=2)
    launch(parse_args(args))


def _check(args: Namespace) -> None:
    if args.no_python and not args.use_env:
        raise UsageError(
            "When using the '--no-python' flag, you must also set the '--use-env' flag; without Python no --local-rank is passed"
        )


def _parse(args: Sequence[str] | None) -> Namespace:
    parsed = parse_args(args)
    warnings.warn_explicit(_DEPRECATION, FutureWarning, "ferroelastic.launch", 1)
    _check(parsed)
    return parsed


if __name__ == "__main__":
    console(_parse)
