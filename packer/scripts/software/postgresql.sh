#!/bin/bash
# PostgreSQL of the distribution, server and client: the command psql.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

install_from_apt postgresql postgresql-client
prove psql --version
