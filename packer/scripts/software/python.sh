#!/bin/bash
# Python of the distribution, with what installs packages and programs of others: venv, pip, pipx.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

install_from_apt python3 python3-venv python3-pip pipx
prove python3 --version
prove pip3 --version
prove pipx --version
