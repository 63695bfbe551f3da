#!/bin/bash
# Blender, of the distribution: the command blender.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

install_from_apt blender
prove blender --version
