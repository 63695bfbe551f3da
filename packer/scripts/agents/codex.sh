#!/bin/bash
# Codex CLI, from the npm registry: the command codex.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

install_from_npm @openai/codex
