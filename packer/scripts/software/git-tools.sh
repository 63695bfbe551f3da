#!/bin/bash
# Git with large files (git-lfs) and GitHub's command line (gh), of the distribution.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

install_from_apt git git-lfs gh
prove git --version
prove git-lfs --version
prove gh --version
