"""Host name -> an address that may be connected to: a public one, checked before it is used."""

import ipaddress
import socket
from collections.abc import Callable

# IPv4 within IPv6, as networks without IPv4 have it (RFC 6052)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
  """Whether an IP address is one of the public internet: not private, loopback, link-local,
  multicast or reserved, nor one of these written as IPv6.
  """
  ip = ipaddress.ip_address(address.partition("%")[0])
  if isinstance(ip, ipaddress.IPv6Address):
    if ip in _NAT64:
      ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    else:
      ip = ip.ipv4_mapped or ip.sixtofour or ip
  return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def checked_address(host: str, port: int, permitted: Callable[[str], bool]) -> str:
  """The first IP address of a host that is permitted. Whoever connects to it connects to what was
  checked, whatever the name means a moment later.

  Raises:
    ValueError: none of its addresses is.
    OSError: the name cannot be resolved.
  """
  found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
  addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
  good = next(filter(permitted, addresses), None)
  if good is None:
    raise ValueError(
      f"{host} is {', '.join(addresses[:3])}, which is no address of the public internet; such are "
      "never fetched: download the image and name the file"
    )
  return good
