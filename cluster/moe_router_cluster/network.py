"""Which network interface the ranks of a cluster meet over."""

import fcntl
import os
import socket
import struct

_SIOCGIFADDR = 0x8915  # of Linux: the IPv4 address of an interface
_GLOO = "GLOO_SOCKET_IFNAME"


def point_gloo_to(address: str, port: int) -> None:
    """Have gloo listen where the rank at `address` is reached from; a choice of the user stays.

    By itself gloo takes the address that the host's name resolves to, which on many machines is
    127.0.1.1 or nothing, and no other host gets through.
    """
    if _GLOO in os.environ:
        return
    name = interface_towards(address, port)
    if name is not None:
        os.environ[_GLOO] = name


def interface_towards(address: str, port: int) -> str | None:
    """The interface that packets to `address` leave by; None of an address that is not IPv4."""
    if ":" in address:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))  # UDP: chooses a route and sends nothing
        ours = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            if _ipv4_of(probe, name) == ours:
                return name
    return None


def _ipv4_of(probe: socket.socket, interface: str) -> str | None:
    try:
        answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", interface.encode()))
    except OSError:  # it has none
        return None
    return socket.inet_ntoa(answer[20:24])
