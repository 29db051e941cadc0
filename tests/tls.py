"""A certificate for this machine, signed by itself."""

import shutil
import subprocess

import pytest


def certificate(folder):
    """Paths of the PEM files of a certificate and its key; skips where nobody can make them."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl, to make a certificate")
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    pem, key = folder / "cert.pem", folder / "key.pem"
    files = ["-keyout", str(key), "-out", str(pem)]
    subprocess.run([*make.split(), *names, *files], check=True, capture_output=True)
    return pem, key
