#!/bin/bash
# Jupyter Notebook of the distribution, with a Python kernel: the command jupyter.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

install_from_apt jupyter-notebook jupyter-client python3-ipykernel
prove jupyter notebook --version
