"""A local server that speaks S3 over HTTP, for tests."""

from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import pytest
from moto.server import ThreadedMotoServer


@contextmanager
def s3_server() -> Iterator[str]:
    """The URL of an empty bucket; the environment points this process, and its children, there."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        kind = fsspec.get_filesystem_class("s3")
        kind.clear_instance_cache()  # one may know the address of a server that is gone
        kind().makedirs("bucket", exist_ok=True)
        try:
            yield "s3://bucket/runs"
        finally:
            kind.clear_instance_cache()
            server.stop()
