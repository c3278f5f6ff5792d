"""Which network addresses may be contacted: the public internet's, and private networks that are permitted by name.

Python's `is_global` follows IANA's special-purpose registries, but not every release follows all of them, and it
calls multicast global; what is added here makes the answer the same on each.
"""

from collections.abc import Sequence
from functools import cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

# All that IANA has given out for hosts: what lies outside is local, multicast, deprecated or not assigned.
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are the IPv4 address that is meant
_NOT_PUBLIC = (
    IPv4Network("192.0.0.0/24"),  # IETF protocol assignments, and Oracle's metadata service
    IPv4Network("192.88.99.0/24"),  # 6to4 relays, deprecated
    IPv4Network("168.63.129.16/32"),  # public in form, but it is Azure's host agent to every machine there
    IPv6Network("2001::/23"),  # IETF protocol assignments: Teredo, which embeds IPv4 addresses, is one
    IPv6Network("2002::/16"),  # 6to4, deprecated: embeds an IPv4 address
    IPv6Network("3fff::/20"),  # documentation, RFC 9637
)


def is_permitted(address: str, networks: Sequence[str] = ()) -> bool:
    """Whether a numeric address is public, or inside one of the networks (such as `10.0.0.0/8`).

    IPv4-mapped and NAT64 addresses are judged by the IPv4 address inside. 6to4, Teredo and IPv4-compatible ones are
    never public.

    Raises:
        ValueError: the address is not a numeric one, or a network is misspelt.
    """
    meant = _meant(ip_address(address))
    return any(meant in network(name) for name in networks) or _is_public(meant)


@cache
def network(name: str) -> IPv4Network | IPv6Network:
    """The network of a name such as `127.0.0.0/8`; ValueError if it is none."""
    try:
        return ip_network(name)
    except ValueError as error:
        raise ValueError(f"{name!r} is not a network ({error}): write it like 127.0.0.0/8 or fd00::/8") from error


def _meant(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv6Address) and address not in _GLOBAL_UNICAST:
        return False
    return address.is_global and not address.is_multicast and not any(address in other for other in _NOT_PUBLIC)
