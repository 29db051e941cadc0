"""Which addresses may be open, and to whom."""

from pathlib import Path

import pytest

from moe_router.errors import ConfigError
from moe_router.serving.exposure import Tls, is_loopback, require_guarded

TLS = Tls(Path("cert.pem"), Path("key.pem"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.0.1", "::1", "localhost"])
def test_loopback_may_be_open(host):
    assert is_loopback(host)
    require_guarded("host", host, token=None, tls=None, insecure=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "localhost.example.org", ""])
@pytest.mark.parametrize(
    ("token", "tls", "insecure", "lacks"),
    [
        (None, None, False, "a token"),
        (None, TLS, False, "a token"),
        (None, None, True, "a token"),  # what encrypts does not say who asks
        ("secret", None, False, "TLS"),
        ("secret", TLS, False, None),
        ("secret", None, True, None),
    ],
)
def test_any_other_wants_a_token_and_tls(host, token, tls, insecure, lacks):
    assert not is_loopback(host)
    if lacks is None:
        require_guarded("host", host, token=token, tls=tls, insecure=insecure)
        return
    with pytest.raises(ConfigError, match=f"^host={host}: want {lacks} where others") as said:
        require_guarded("host", host, token=token, tls=tls, insecure=insecure)
    assert "secret" not in str(said.value)
