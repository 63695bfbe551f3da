#!/bin/bash
# Gemini CLI, at its latest version.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

install_agent gemini
