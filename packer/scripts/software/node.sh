#!/bin/bash
# Node.js with npm and npx, the same as the agents run on.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

bash "$SCRIPTS/node.sh"
prove node --version
prove npm --version
