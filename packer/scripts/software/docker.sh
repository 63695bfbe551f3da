#!/bin/bash
# Docker Engine of the distribution, with compose and, where there is a package of it, buildx.
#
# Nobody is put into the group docker: its members are root by another name.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

# The first of these packages that the distribution has; nothing if it has none.
first_available() {
    local name
    for name in "$@"; do
        if [[ $(apt-cache policy "$name") == *"Candidate: "[0-9]* ]]; then
            echo "$name"
            return
        fi
    done
}

# Ubuntu has compose as a plugin of Docker's client, Debian 12 as a program of its own.
compose=$(first_available docker-compose-v2 docker-compose)
buildx=$(first_available docker-buildx)
# shellcheck disable=SC2086  # empty where there is no package
install_from_apt docker.io $compose $buildx
prove docker --version
prove dockerd --version
if [[ $compose == docker-compose ]]; then
    prove docker-compose --version
else
    prove docker compose version
fi
