#!/bin/bash
# Makes the machine that it runs on an agent's image. Packer uploads this folder and runs this file as root.
#
# Settings come from the environment:
#   KILN_PROVIDER          the agent: a file of agents/, without .sh
#   KILN_AGENT_VERSION     latest, another tag of its registry, or a pinned version
#   KILN_AGENT_USER        the user without privileges that the agent runs as
#   KILN_EXTRA_PACKAGES    Debian packages to install as well, separated by spaces or commas
#   KILN_NPM_REGISTRY      URL of the npm registry; empty for npm's default
#   KILN_NPM_TOKEN         its token; empty where it asks for none
#   KILN_CURSOR_INSTALLER  address of a mirror of cursor's installer; empty for the vendor's
# A file ca-bundle.pem in this folder holds further certificate authorities to trust during the build.
#
# It may run again on a machine that it has run on. A failure is one line that begins with "error: ".
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

check_settings
bash "$SCRIPTS/base.sh"
bash "$SCRIPTS/agents/$KILN_PROVIDER.sh"
bash "$SCRIPTS/verify.sh"
bash "$SCRIPTS/clean.sh"
