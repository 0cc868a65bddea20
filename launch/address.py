"""python launch/address.py HEAD: print this machine's address and network interface that lead to the machine HEAD.

Prints `ADDRESS INTERFACE true|false`. The last word says whether this machine is HEAD; on loopback, where any process
could be HEAD, it is omitted.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
import time

import psutil

PATIENCE_S = 600.0
"""How long to wait until a name resolves: in Kubernetes it does once its pod has an address."""


def resolved(host: str) -> tuple[socket.AddressFamily, str]:
    """(family, address) of `host`. Raises: OSError if it does not resolve within PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            family, _, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)[0]
            return family, str(address[0])
        except socket.gaierror:
            if time.monotonic() > deadline:
                raise
            time.sleep(2.0)


def local_address(family: socket.AddressFamily, head: str) -> str:
    """The address from which this machine reaches `head`."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((head, 9))  # a datagram socket, so nothing is sent
        return str(probe.getsockname()[0])


def interface(address: str) -> str:
    """The name of the network interface that has `address`."""
    for name, held in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in held):
            return name
    raise OSError(f"no network interface has the address {address}")


def main(host: str) -> int:
    family, head = resolved(host)
    address = local_address(family, head)
    loopback = ipaddress.ip_address(address).is_loopback
    if loopback and host != head:
        print(
            f"HEAD: expected an address that all machines can reach, got {host}, which is {head} on this machine; "
            "give another",
            file=sys.stderr,
        )
        return 2
    print(address, interface(address), "" if loopback else str(address == head).lower())
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
