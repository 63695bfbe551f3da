#!/bin/bash
# Gemini CLI, from the npm registry: the command gemini.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

install_from_npm @google/gemini-cli
