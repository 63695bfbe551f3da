#!/bin/bash
# Rust of the distribution: rustc and cargo. With a C compiler's linker, which rustc calls.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

install_from_apt rustc cargo gcc libc6-dev
prove rustc --version
prove cargo --version
