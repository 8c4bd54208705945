"""Where the server may connect to on a stranger's word: plain URLs, and public addresses."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from mm.serve.limits import MediaLimits, Refused

PORTS = {"http": 80, "https": 443}
URL_CHARACTERS = 8_192
# Read here and nowhere else: what connects takes the parts, so no second parser can see another host in it.
# No user, no brackets, no escapes, no backslash, no character beyond ASCII in what names the host.
_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>[a-z0-9.-]+)(?::(?P<port>[0-9]{1,5}))?(?P<target>[/?][!-\[\]-~]*)?", re.IGNORECASE
)
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
_UNICAST = IPv6Network("2000::/3")  # all that IANA has given out; mapped, local, unique-local and the like lie outside
# Inside it, and reaching other addresses than they show: Teredo and other protocols', 6to4; documentation.
_NOT_V6 = [IPv6Network(net) for net in ("2001::/23", "2002::/16", "2001:db8::/32", "3fff::/20")]
_NOT_V4 = [IPv4Network(net) for net in ("192.0.0.0/24", "192.88.99.0/24", "224.0.0.0/3")]  # protocols', 6to4, multicast
_ISATAP = (b"\x00\x00\x5e\xfe", b"\x02\x00\x5e\xfe")  # RFC 5214: an IPv4 address follows


@dataclass(frozen=True)
class Target:
    """What to ask of whom: `scheme` http or https, `host` in lower case, `path` as it goes on the wire."""

    scheme: str
    host: str
    port: int
    path: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}{self.path}"


def read_url(url: str, limits: MediaLimits) -> Target:
    """Raises Refused unless it is http(s)://HOST[:80 or 443]/... with a host that is allowed by name."""
    plain = url.partition("#")[0]
    found = _URL.fullmatch(plain) if len(plain) <= URL_CHARACTERS else None
    if found is None:
        raise Refused("url_not_allowed", f"{url[:100]!r} is not a plain http or https URL")
    scheme, host = found["scheme"].lower(), found["host"].lower()
    port = int(found["port"] or PORTS[scheme])
    if port not in PORTS.values():
        raise Refused("url_not_allowed", f"port {port} of {host}: only {', '.join(map(str, PORTS.values()))}")
    if host not in limits.hosts:
        raise Refused("url_not_allowed", f"host {host[:100]} is not among the allowed ones")
    path = found["target"] or "/"
    return Target(scheme, host, port, path if path.startswith("/") else "/" + path)


def check_addresses(host: str, addresses: list[str]) -> list[str]:
    """The addresses that a name resolved to, if all are public; raises Refused if any is not, or there is none."""
    if not addresses:
        raise Refused("url_not_fetched", f"{host} has no address")
    for address in addresses:
        if not is_public(address):
            raise Refused("url_not_allowed", f"{host} is at {address}, which is not a public address")
    return addresses


def is_public(text: str) -> bool:
    """Whether this is an IPv4 or IPv6 address that anyone may reach on the public internet, and leads nowhere else."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, IPv4Address):
        return address.is_global and not any(address in net for net in _NOT_V4)
    return _is_public_v6(address)


def _is_public_v6(address: IPv6Address) -> bool:
    if address.scope_id is not None:  # fe80::1%eth0: of one link
        return False
    if address.ipv4_mapped is not None:
        return is_public(str(address.ipv4_mapped))
    if address in _NAT64:
        return is_public(str(IPv4Address(address.packed[-4:])))
    outside = address not in _UNICAST or any(address in net for net in _NOT_V6)
    return address.is_global and not outside and address.packed[8:12] not in _ISATAP
