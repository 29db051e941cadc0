import os

import pytest

from moe_router_cluster.network import interface_towards, point_gloo_to


def test_this_machine_is_reached_over_the_loopback():
    assert interface_towards("127.0.0.1", 9) == "lo"


def test_an_address_without_ipv4_leaves_the_choice_to_gloo(monkeypatch):
    assert interface_towards("::1", 9) is None
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    point_gloo_to("::1", 9)

    assert "GLOO_SOCKET_IFNAME" not in os.environ


@pytest.mark.parametrize(("chosen", "used"), [(None, "lo"), ("eth7", "eth7")])
def test_gloo_is_told_unless_the_user_was_there_first(monkeypatch, chosen, used):

    # setenv first: what the call sets is taken back with it
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", chosen or "")
    if chosen is None:
        del os.environ["GLOO_SOCKET_IFNAME"]
    point_gloo_to("127.0.0.1", 9)
    assert os.environ["GLOO_SOCKET_IFNAME"] == used
