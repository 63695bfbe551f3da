#!/bin/bash
# Claude Code, from the npm registry: the command claude.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

install_from_npm @anthropic-ai/claude-code
