"""Keys and JWTs of an operator, its accounts and users, as `nsc` would make them; signed with the package nkeys."""

from __future__ import annotations

import base64
import json
import os
import time
from pathlib import Path
from typing import Any

import nkeys

_UNLIMITED = ("subs", "data", "payload", "imports", "exports", "conn", "leaf", "mem_storage", "disk_storage", "streams")


def new_key(prefix: int) -> Any:
    """A new key pair; `prefix` is one of nkeys.PREFIX_BYTE_*."""
    return nkeys.from_seed(bytearray(nkeys.encode_seed(os.urandom(32), prefix)))


def new_user() -> tuple[str, str]:
    """(seed, public key)"""
    pair = new_key(nkeys.PREFIX_BYTE_USER)
    return bytes(pair.seed).decode(), pair.public_key.decode()


class Operator:
    """A server's trust: an operator, a system account, and the account TEAM in which users are made."""

    def __init__(self) -> None:
        self._key, self._system, self._team = (
            new_key(prefix)
            for prefix in (nkeys.PREFIX_BYTE_OPERATOR, nkeys.PREFIX_BYTE_ACCOUNT, nkeys.PREFIX_BYTE_ACCOUNT)
        )
        self._operator = self._jwt(self._key, self._key, "OP", {"type": "operator"})
        self.revoked: dict[str, int] = {}

    def config(self) -> str:
        """For the server: the MEMORY resolver with both accounts preloaded."""
        limits = dict.fromkeys((*_UNLIMITED, "consumer"), -1)
        team = {"type": "account", "limits": {**limits, "wildcards": True}, "revocations": self.revoked}
        system = {"type": "account", "limits": {**dict.fromkeys(_UNLIMITED[:7], -1), "wildcards": True}}
        preload = {
            self._system: self._jwt(self._key, self._system, "SYS", system),
            self._team: self._jwt(self._key, self._team, "TEAM", team),
        }
        accounts = "\n".join(f"  {pair.public_key.decode()}: {jwt}" for pair, jwt in preload.items())
        return (
            f"operator: {self._operator}\nsystem_account: {self._system.public_key.decode()}\n"
            f"resolver: MEMORY\nresolver_preload: {{\n{accounts}\n}}"
        )

    def user(self, file: Path) -> str:
        """Writes the credentials file of a new user; its public key."""
        pair = new_key(nkeys.PREFIX_BYTE_USER)
        jwt = self._jwt(
            self._team, pair, "worker", {"type": "user", "pub": {}, "sub": {}, **dict.fromkeys(_UNLIMITED[:3], -1)}
        )
        file.write_text(
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            "************************* IMPORTANT *************************\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{bytes(pair.seed).decode()}\n------END USER NKEY SEED------\n"
        )
        return str(pair.public_key.decode())

    def revoke(self, user: str) -> None:
        self.revoked[user] = int(time.time()) + 1

    @staticmethod
    def _jwt(issuer: Any, subject: Any, name: str, nats: dict[str, Any]) -> str:
        claims = {
            "jti": base64.b32encode(os.urandom(32)).decode().rstrip("="),
            "iat": int(time.time()),
            "iss": issuer.public_key.decode(),
            "sub": subject.public_key.decode(),
            "name": name,
            "nats": {**nats, "version": 2},
        }
        signed = f"{_part({'typ': 'JWT', 'alg': 'ed25519-nkey'})}.{_part(claims)}"
        return f"{signed}.{_coded(issuer.sign(signed.encode()))}"


def _part(what: dict[str, Any]) -> str:
    return _coded(json.dumps(what).encode())


def _coded(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")
