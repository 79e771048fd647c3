"""Certificates for 127.0.0.1, made with openssl when a test asks for them."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Certificate:
    """Files in PEM; it is its own authority, so `cert` is also the `ca` that trusts it."""

    cert: Path
    key: Path


def certificate(folder: Path, name: str) -> Certificate:
    """A new one, good for server and client alike."""
    made = Certificate(folder / f"{name}.cert.pem", folder / f"{name}.key.pem")
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    files = ["-keyout", str(made.key), "-out", str(made.cert)]
    subprocess.run([*command.split(), *files], cwd=folder, check=True, capture_output=True)
    return made
