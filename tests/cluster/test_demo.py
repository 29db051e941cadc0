"""`moe-router demo --chaos` as a person uses it: a shard is killed while the sentence goes on."""

import signal

import pytest

from moe_router.training.loop import Trainer
from moe_router_cluster.run_folder import open_run
from tests.cluster.serving_calls import start
from tests.cluster.test_submit import free_ports
from tests.serving.browser import CHROMIUM, browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]


@pytest.fixture(scope="module")
def run(tiny_of_module):
    config = tiny_of_module(actors=2)
    with open_run(config, restart=False) as folder:
        trainer = Trainer(config, run_dir=folder.path)
        trainer.train_step()
        trainer.save(folder.path, wait=True)
    return folder.path


def test_a_killed_shard_comes_back_and_the_text_is_whole(run):
    (port,) = free_ports(1)
    options = [str(run), "--chaos", "--no-browser", "--port", str(port)]
    process, _ = start(options, run.parent, command="demo")
    try:
        said = []
        while not said or "Ctrl-C" not in said[-1]:
            said.append(process.stdout.readline())
            assert said[-1], f"{said} {process.stderr.read()}"
        assert any(line.startswith(f"page  http://127.0.0.1:{port}") for line in said)
        with browser() as page:
            texts = [told(page, port, kill) for kill in (False, True)]
        assert texts[0] == texts[1] and len(texts[0]) > 100
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 0


def told(page, port, kill):
    """The text of the page; a shard is killed on the way."""
    page.open(f"http://127.0.0.1:{port}/?prompt=The%20")
    page.until("document.querySelectorAll('#kill button').length === 2")
    page.run("document.querySelector('#tokens').value = 150")
    page.run("document.querySelector('#temperature').value = 0")
    page.run("document.querySelector('#go').click()")
    page.until("document.querySelectorAll('.token').length > 20")
    if kill:
        page.run("document.querySelectorAll('#kill button')[1].click()")
        page.until("document.querySelector('#status').textContent.includes('is back')", 90)
    page.until("!document.querySelector('#go').disabled", 90)
    return page.run("document.querySelector('#text').textContent")
