#!/bin/bash
# Chromium of Debian: the command chromium. Ubuntu has it as a snap only.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

install_from_apt chromium
prove chromium --version
