#!/bin/bash
# The user that the agent runs as, and the packages that every agent needs or the user asked for.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# A fresh cloud instance is still configuring its package sources when SSH first answers.
wait_for_cloud_init() {
    if command -v cloud-init >/dev/null; then
        cloud-init status --wait >/dev/null || true
    fi
}

make_user() {
    if ! getent passwd "$KILN_AGENT_USER" >/dev/null; then
        say "making user $KILN_AGENT_USER"
        useradd --create-home --shell /bin/bash "$KILN_AGENT_USER"
    fi
    [[ $(id -u "$KILN_AGENT_USER") != 0 ]] || fail "user $KILN_AGENT_USER is root by another name"
}

install_packages() {
    local extra
    mapfile -t extra < <(extra_packages)
    say "installing ca-certificates curl git ${extra[*]}"
    apt_get update || fail "apt-get update failed: the package sources cannot be read"
    apt_get install ca-certificates curl git "${extra[@]}" ||
        fail "apt-get could not install: ca-certificates curl git ${extra[*]}"
}

wait_for_cloud_init
make_user
install_packages
