import os
import signal

import pytest

from moe_router_cluster.interrupts import Interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_wish_and_the_second_an_order(number):
    with Interrupts() as interrupts:
        interrupts.graceful = True
        os.kill(os.getpid(), number)
        assert interrupts.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


def test_with_nothing_to_save_the_first_signal_ends_the_run():
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    assert interrupts.asked


def test_handlers_come_back_even_over_those_of_somebody_else():
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts() as interrupts:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        interrupts.take_over()
        interrupts.graceful = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.asked
    assert signal.getsignal(signal.SIGTERM) is before
