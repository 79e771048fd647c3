"""Who may connect: each mechanism once right and once wrong on a real server, and credentials that end while we run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orchestrator.brokers.nats import adapter
from orchestrator.errors import BrokerUnavailable, OrchestratorError
from orchestrator.topology.model import Auth, Tls
from tests.nats.jwts import Operator, new_user
from tests.nats.rig import Rig, rig, topology, until
from tests.servers.certificates import certificate
from tests.servers.nats import NatsServer


@contextmanager
def serving(config: str) -> Iterator[NatsServer]:
    server = NatsServer(config).start()
    try:
        yield server
    finally:
        server.close()


async def works(made: Rig) -> None:
    """An event goes out and comes in."""
    consumer, sink = await made.consumer()
    consumer.demand(1)
    await made.publish(made.event())
    await sink.take()
    await consumer.close()


async def refused(plan: Any, *, patience: float = 2.0) -> OrchestratorError:
    with pytest.raises(OrchestratorError) as caught:
        await adapter.connect(plan, plan.brokers["main"], name="test", patience=patience)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("config", "good", "bad"),
    [
        (
            'authorization { user: "u", password: "p" }',
            Auth("plain", username="u", password="p"),
            Auth("plain", username="u", password="no"),
        ),
        ('authorization { token: "t" }', Auth("token", token="t"), Auth("token", token="no")),
    ],
)
async def test_password_and_token(config: str, good: Auth, bad: Auth) -> None:
    with serving(config) as server:
        async with rig(server.url, topology(server.url, auth=good)) as made:
            await works(made)
        error = await refused(topology(server.url, auth=bad))
        assert isinstance(error, BrokerUnavailable)
        assert "uthorization" in str(error)
        assert "brokers.main.auth" in str(error.hint)


async def test_nkey() -> None:
    seed, public = new_user()
    with serving(f"authorization {{ users: [{{ nkey: {public} }}] }}") as server:
        async with rig(server.url, topology(server.url, auth=Auth("nkey", seed=f" {seed}\n"))) as made:
            await works(made)
        error = await refused(topology(server.url, auth=Auth("nkey", seed=new_user()[0])))
        assert isinstance(error, BrokerUnavailable)
        assert "does not know this user" in str(error.hint)


@pytest.mark.parametrize("seed", ["", "hunter2", "SUAAAA", "SU" + "1" * 56, "SU\u00e4", "public", "cut"])
async def test_a_seed_that_is_none_is_said_without_showing_it(seed: str) -> None:
    whole, public = new_user()
    seed = {"public": public, "cut": whole[:-10]}.get(seed, seed)
    error = await refused(topology("nats://127.0.0.1:1", auth=Auth("nkey", seed=seed)))
    assert "brokers.main.auth.seed" in str(error)
    assert not seed or seed not in f"{error} {error.hint}"


async def test_nkey_user_that_is_taken_away_and_given_back() -> None:
    seed, public = new_user()
    with serving(f"authorization {{ users: [{{ nkey: {public} }}] }}") as server:
        async with rig(server.url, topology(server.url, auth=Auth("nkey", seed=seed))) as made:
            consumer, sink = await made.consumer()
            server.reload(f"authorization {{ users: [{{ nkey: {new_user()[1]} }}] }}")
            await until(lambda: "uthorization" in str(sink.troubles[-1:]), "the reason was told")
            server.reload(f"authorization {{ users: [{{ nkey: {public} }}] }}")
            await until(lambda: sink.troubles[-1] is None, "it is back")
            await consumer.close()
            await works(made)


async def test_creds(tmp_path: Path) -> None:
    operator, stranger = Operator(), Operator()
    operator.user(tmp_path / "worker.creds")
    stranger.user(tmp_path / "stranger.creds")
    with serving(operator.config()) as server:
        plan = topology(server.url, tmp_path, auth=Auth("creds", file="worker.creds"))  # beside the topology file
        async with rig(server.url, plan) as made:
            await works(made)
        error = await refused(topology(server.url, auth=Auth("creds", file=str(tmp_path / "stranger.creds"))))
        assert isinstance(error, BrokerUnavailable)
        assert "does not know this user" in str(error.hint)


async def test_creds_that_are_revoked_are_said_and_replaced_ones_are_taken(tmp_path: Path) -> None:
    operator, file = Operator(), tmp_path / "worker.creds"
    user = operator.user(file)
    with serving(operator.config()) as server:
        plan = topology(server.url, auth=Auth("creds", file=str(file)))
        async with rig(server.url, plan) as made:
            consumer, sink = await made.consumer()
            operator.revoke(user)
            server.reload(operator.config())
            await until(lambda: "uthorization" in str(sink.troubles[-1:]), "the reason was told")
            await refused(plan)
            file.write_text("half a fi")
            await until(lambda: "no user JWT" in str(sink.troubles[-1:]), "the broken file was told")
            file.unlink()
            await until(lambda: "cannot read" in str(sink.troubles[-1:]), "the missing file was told")
            operator.user(file)
            await until(lambda: sink.troubles[-1] is None, "it is back")
            await consumer.close()
            await works(made)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot read"),
        ("", "no user JWT"),
        ("-----BEGIN NATS USER JWT-----\neyJ0\n------END NATS USER JWT------\n", "no user JWT"),
        ("-----BEGIN NATS USER JWT-----\neyJ0\n-----BEGIN USER NKEY SEED-----\nhunter2\n", "no seed"),
        ("\udcff", "cannot read"),
    ],
)
async def test_a_credentials_file_that_is_none_is_said_at_once(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "worker.creds").write_text(text, errors="surrogateescape")
    error = await refused(topology("nats://127.0.0.1:1", tmp_path, auth=Auth("creds", file="worker.creds")))
    assert said in str(error)
    assert "brokers.main.auth.file" in str(error)
    assert "hunter2" not in str(error)


async def test_password_that_is_changed_and_changed_back() -> None:
    with serving('authorization { user: "u", password: "p" }') as server:
        async with rig(server.url, topology(server.url, auth=Auth("plain", username="u", password="p"))) as made:
            consumer, sink = await made.consumer()
            server.reload('authorization { user: "u", password: "other" }')
            await until(lambda: "uthorization" in str(sink.troubles[-1:]), "the reason was told")
            server.reload('authorization { user: "u", password: "p" }')
            await until(lambda: sink.troubles[-1] is None, "it is back")
            await consumer.close()
            await works(made)


async def test_tls_with_client_certificate(tmp_path: Path) -> None:
    made = certificate(tmp_path, "ours")
    tls = Tls(ca=str(made.cert), cert=str(made.cert), key=str(made.key))
    with serving(
        f'tls {{ cert_file: "{tls.cert}", key_file: "{tls.key}", ca_file: "{tls.ca}", verify: true }}'
    ) as server:
        url = server.url.replace("nats:", "tls:")
        async with rig(url, topology(url, tls=tls)) as connected:
            await works(connected)
        without = Tls(ca=tls.ca)  # the server asks for a certificate of ours
        unknown = Tls(cert=tls.cert, key=tls.key)  # we know nobody who vouches for the server's
        for wrong in (None, without, unknown):
            error = await refused(topology(url, tls=wrong))
            assert isinstance(error, BrokerUnavailable)
            assert "brokers.main.tls" in str(error.hint), wrong
    error = await refused(topology(url, tls=Tls(ca=str(tmp_path / "absent.pem"))))
    assert "brokers.main.tls" in str(error)


async def test_a_credentials_file_without_an_end_is_not_read_to_it() -> None:
    assert "no user JWT" in str(await refused(topology("nats://127.0.0.1:1", auth=Auth("creds", file="/dev/zero"))))


@pytest.mark.parametrize("mechanism", ["nkey", "creds"])
async def test_what_to_install_is_said(mechanism: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nkeys", None)
    error = await refused(topology("nats://127.0.0.1:1", auth=Auth(mechanism, seed="SU", file="x.creds")))
    assert "needs the package nkeys" in str(error)
    assert error.hint == "pip install 'orchestrator[nkeys]'"


async def test_mechanism_that_nats_lacks_is_named() -> None:
    error = await refused(topology("nats://127.0.0.1:1", auth=Auth("scram-sha-512")))
    assert "NATS has no scram-sha-512" in str(error)
