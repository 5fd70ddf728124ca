"""Mirror of ``torch.distributed.elastic.rendezvous.utils``.

Intended differences:

* A host also matches this machine by the address of a secondary interface.
* A local host name that does not resolve is not an error.
"""

from __future__ import annotations

import re
import socket

__all__ = ["parse_rendezvous_endpoint"]

_MAX_PORT = 65535


def _parse_rendezvous_config(config_str: str) -> dict[str, str]:
    """Parse the options of ``key=value,key=value``.

    Raises:
        ValueError: an option has no key or no value.
    """
    config: dict[str, str] = {}
    if not config_str.strip():
        return config
    for option in config_str.split(","):
        key, _, value = (part.strip() for part in option.partition("="))
        if not key:
            raise ValueError(
                "The rendezvous configuration string must be in format <key1>=<value1>,...,<keyN>=<valueN>."
            )
        if not value:
            raise ValueError(f"The rendezvous configuration option '{key}' must have a value specified.")
        config[key] = value
    return config


def _try_parse_port(port_str: str) -> int | None:
    """Return the number, or ``None`` if the text is not one to five digits."""
    return int(port_str) if re.fullmatch(r"[0-9]{1,5}", port_str) else None


def parse_rendezvous_endpoint(endpoint: str | None, default_port: int) -> tuple[str, int]:
    """Parse ``host[:port]``. Mirrors torch's ``parse_rendezvous_endpoint``.

    Args:
        endpoint: the endpoint. An IPv6 address is in brackets. ``None`` or an empty text means localhost.
        default_port: port for an endpoint without a port.

    Returns:
        Host and port.

    Raises:
        ValueError: the port is not a number from 0 to 65535, or the host has invalid characters.
    """
    endpoint = (endpoint or "").strip()
    if not endpoint:
        return "localhost", default_port

    is_bare_ipv6 = endpoint.startswith("[") and endpoint.endswith("]")
    host, colon, port_text = (endpoint, "", "") if is_bare_ipv6 or ":" not in endpoint else endpoint.rpartition(":")
    if len(host) > 1 and host.startswith("[") and host.endswith("]"):
        host = host[1:-1]

    port: int | None = default_port
    if colon:
        port = _try_parse_port(port_text)
        if port is None or port > _MAX_PORT:
            raise ValueError(
                f"The port number of the rendezvous endpoint '{endpoint}' must be an integer between 0 and 65536."
            )
    if not re.fullmatch(r"[\w.:-]+", host):
        raise ValueError(
            f"The hostname of the rendezvous endpoint '{endpoint}' must be a dot-separated list of labels, an IPv4 "
            "address, or an IPv6 address."
        )
    assert port is not None  # noqa: S101 - for the type checker
    return host, port


def _matches_machine_hostname(host: str) -> bool:
    """Return whether a host name or address belongs to this machine."""
    if host in {"localhost", socket.gethostname()}:
        return True
    local = _resolve(socket.gethostname())
    if host in {name for name, _ in local if name}:
        return True
    local_addresses = {address for _, address in local}
    return any(address in local_addresses or _is_local_address(address) for _, address in _resolve(host))


def _resolve(host: str) -> list[tuple[str, str]]:
    """Return the canonical name (or ``""``) and the address of each record of ``host``; empty if the host does not resolve."""
    from ferroelastic.utils import _interruptible

    try:
        # A resolver timeout may take minutes. Signal handlers must run during it.
        records = _interruptible.call(
            socket.getaddrinfo, host, None, proto=socket.IPPROTO_TCP, flags=socket.AI_CANONNAME
        )
    except (OSError, ValueError):
        return []
    return [(name, str(address[0])) for _, _, _, name, address in records]


def _is_local_address(address: str) -> bool:
    """Return whether an address is local: the kernel uses a local destination as the source address. No packet is sent."""
    import ipaddress

    if ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return True
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            source: str = probe.getsockname()[0]
    except OSError:
        return False
    return source == address
