#!/bin/bash
# Go of the distribution: the command go. With git, which fetches modules, and a C compiler for cgo.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

install_from_apt golang-go gcc libc6-dev
prove go version
