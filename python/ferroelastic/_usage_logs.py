"""The options of ``ferrorun`` for the lines of workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ferroelastic._usage import UsageError, named

if TYPE_CHECKING:
    from argparse import Namespace

    from ferroelastic.multiprocessing._log_options import LogOptions

__all__ = ["log_settings", "parse_log_options", "parse_rank_ranges", "with_files"]


def parse_rank_ranges(text: str) -> tuple[range, ...]:
    """Parse ``--ranks-filter``: ``"0,8-15"`` is rank 0 and the ranks 8 to 15.

    Raises:
        UsageError: the value is not a list of ranks and ranges of ranks.
    """
    ranges = []
    for part in text.split(",") if text else ():
        first, dash, last = map(str.strip, part.partition("-"))
        if not (first.isdecimal() and (last.isdecimal() if dash else not last)) or int(first) > int(last or first):
            raise UsageError(
                f"{named('ranks_filter', text)}: {part!r} is neither a rank nor a range of ranks; write e.g. --ranks-filter=0,8-15"
            )
        ranges.append(range(int(first), int(last or first) + 1))
    return tuple(ranges)


def parse_log_options(args: Namespace) -> LogOptions | None:
    """Parse the options for the lines of workers.

    Args:
        args: the parsed command line.

    Returns:
        The options; ``None`` if none is set.

    Raises:
        UsageError: a value is invalid.
    """
    is_set = (args.ranks_filter, args.log_format != "text", args.fail_on_log, args.warn_on_log, args.log_max_size)
    if not any(is_set):
        return None
    from ferroelastic.multiprocessing._log_options import LogOptions

    ranks = parse_rank_ranges(args.ranks_filter)
    rules = {name: _parse_rules(f"{name}_log", getattr(args, f"{name}_log")) for name in ("fail_on", "warn_on")}
    try:
        return LogOptions(
            ranks=ranks,
            format=args.log_format,
            fail_on=rules["fail_on"],
            warn_on=rules["warn_on"],
            max_size=_parse_size(args.log_max_size) if args.log_max_size else None,
            max_files=_checked_files(args.log_max_files),
        )
    except UsageError:
        raise
    except ValueError as error:
        fault, pattern = error.args
        dest, reason = next(
            (f"{name}_log", reason) for name, pairs in rules.items() for known, reason in pairs if known == pattern
        )
        raise UsageError(f"{named(dest, f'{pattern}={reason}')}: {fault}") from None


def _parse_rules(dest: str, texts: list[str]) -> tuple[tuple[str, str], ...]:
    rules = []
    for text in texts:
        pattern, equals, reason = text.rpartition("=")
        if not (equals and pattern and reason.strip()):
            raise UsageError(
                f"{named(dest, text)} has no pattern or no reason; write PATTERN=REASON, where the reason begins after the last '='"
            )
        if not reason.isprintable():
            raise UsageError(f"{named(dest, text)}: the reason has a control character; write plain text")
        rules.append((pattern, reason.strip()))
    return tuple(rules)


def _parse_size(text: str) -> int:
    from ferroelastic.multiprocessing._log_options import MIN_LOG_SIZE

    number, unit = text[:-1], text[-1:].upper()
    number, power = (number, "KMGT".index(unit) + 1) if unit and unit in "KMGT" else (text, 0)
    size = int(number) << 10 * power if number.isdecimal() else 0
    if size < MIN_LOG_SIZE:
        raise UsageError(
            f"{named('log_max_size', text)} is not a size of at least {MIN_LOG_SIZE >> 10}K; give bytes, or a number with K, M, G or T"
        )
    return size


def _checked_files(number: int) -> int:
    if number < 1:
        raise UsageError(f"{named('log_max_files', number)} must be at least 1; give the number of files to keep")
    return number


def log_settings(options: LogOptions | None) -> dict[str, Any]:
    """Return the fields of a ``LaunchConfig``. Empty without options: the class may be replaced by torch's."""
    return {} if options is None else {"log_options": options}


def with_files(options: LogOptions | None, redirects: Any, tee: Any, std: Any, nproc_per_node: int) -> Any:
    """Return ``tee``, with all streams that would go to the console directly if the options apply only to files.

    Args:
        options: the options for the lines of workers.
        redirects: streams that are written to files.
        tee: streams that are written to files and to the console.
        std: the ``Std`` class of the result. A plugin for torch needs torch's class.
        nproc_per_node: number of workers on this node.
    """
    if options is None or not options.needs_files():
        return tee
    from ferroelastic.multiprocessing._std import to_map

    redirected, teed = to_map(redirects, nproc_per_node), to_map(tee, nproc_per_node)
    return {rank: std(int(teed[rank]) | (int(std.ALL) & ~int(redirected[rank]))) for rank in range(nproc_per_node)}
