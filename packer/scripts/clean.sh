#!/bin/bash
# Takes away what only the build needed: package lists, caches, and the uploaded folder with the CA bundle in it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# Machines made from the image must not share an identity. A container has none.
forget_machine() {
    if [[ -d /run/systemd/system ]]; then
        truncate --size 0 /etc/machine-id
    fi
    if command -v cloud-init >/dev/null; then
        cloud-init clean --logs
    fi
}

say "cleaning up"
apt_get clean
rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/apt/* /var/log/dpkg.log
forget_machine
[[ $SCRIPTS != /tmp/* ]] || rm -rf "$SCRIPTS"
