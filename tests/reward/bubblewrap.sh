#!/usr/bin/env bash
# Installs bubblewrap, the sandbox of the code reward, by apt-get as root on Debian or Ubuntu; nothing if it is there.
set -euo pipefail

command -v bwrap >/dev/null && exit 0
fail() {
    echo "bubblewrap: $*" >&2
    exit 1
}
((EUID == 0)) || fail "not installed; install your distribution's package bubblewrap"
command -v apt-get >/dev/null || fail "not installed, and there is no apt-get here"
echo "bubblewrap: installing it for tests/reward"
export DEBIAN_FRONTEND=noninteractive
timeout 120 apt-get install -y -qq --no-install-recommends bubblewrap >/dev/null 2>&1 && exit 0
# Package lists may be old or absent.
timeout 120 apt-get update -qq >/dev/null 2>&1 || fail "apt-get update failed: package archives out of reach?"
timeout 180 apt-get install -y -qq --no-install-recommends bubblewrap >/dev/null || fail "apt-get install failed"
