"""Who may reach a server: this machine alone; others with a token, and over TLS."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from moe_router.config import require

_MAKE = (
    "openssl req -x509 -newkey rsa:3072 -nodes -days 365 -subj /CN=NAME "
    "-addext subjectAltName=DNS:NAME -keyout key.pem -out cert.pem"
)


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files: the server's certificate chain, and its private key."""

    certificate: Path
    key: Path


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name: who knows where it leads


def require_guarded(
    where: str, host: str, *, token: str | None, tls: Tls | None, insecure: bool
) -> None:
    """Loopback may be open; any other address wants a token, and TLS unless that is waived.

    Args:
        where: what listens there, for the message.
        insecure: the user says that something else encrypts, such as a mesh.

    Raises:
        ConfigError: the address is open to strangers or to eavesdroppers.
    """
    if is_loopback(host):
        return
    want = "a token where others can connect (--token-file, or MOE_ROUTER_TOKEN), or 127.0.0.1"
    require(token is not None, where, host, want)
    want = f"TLS where others can connect (--tls-certificate, --tls-key; to make them: {_MAKE})"
    waived = "insecure=true (--insecure) where a mesh or a proxy encrypts"
    require(tls is not None or insecure, where, host, f"{want}, or {waived}")
