import os

import pytest

from moe_router.config import ClusterConfig
from moe_router.errors import ClusterError
from moe_router_cluster.session import prepare_environment, ray_session

CHOSEN = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@pytest.fixture
def no_choice(monkeypatch):
    for name in (*CHOSEN, "RAY_ADDRESS"):
        monkeypatch.setenv(name, "x")  # so that what the test sets is undone
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_local_ray_gets_a_token_of_its_own_in_no_file(no_choice):
    no_choice.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    prepare_environment(ClusterConfig())
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert "RAY_ADDRESS" not in os.environ
    assert "RAY_AUTH_MODE" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ


@pytest.mark.parametrize("name", CHOSEN)
def test_what_the_user_chose_stays(no_choice, name):
    no_choice.setenv(name, "mine")
    prepare_environment(ClusterConfig())
    assert [os.environ.get(other) for other in CHOSEN if other != name] == [None, None]
    assert os.environ[name] == "mine"


def test_a_cluster_elsewhere_keeps_the_users_token(no_choice):
    prepare_environment(ClusterConfig(address="10.0.0.1:6379"))
    assert not any(name in os.environ for name in CHOSEN)


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1:1", r"no Ray cluster there \(Connection refused\); start one by `ray start"),
        ("ray://10.0.0.1:10001", "want HOST:PORT of its head, or auto"),
        ("nowhere", "want HOST:PORT of its head, or auto"),
    ],
)
def test_an_address_without_a_cluster_is_refused_at_once(no_choice, address, why):
    with pytest.raises(ClusterError, match=why), ray_session(ClusterConfig(address=address)):
        pytest.fail("Ray started")
