#!/bin/bash
# Makes the machine that it runs on a workstation's image. Packer uploads this folder and runs this file as root.
#
# Settings come from the environment:
#   KILN_SOFTWARE          files of software/, without .sh, in the order in which they are installed, separated by
#                          commas or spaces; empty for none
#   KILN_AGENT_USER, KILN_EXTRA_PACKAGES, KILN_NPM_REGISTRY, KILN_NPM_TOKEN, KILN_CURSOR_INSTALLER: as in build.sh
#   KILN_CHROME_PACKAGE    address of a mirror of Google Chrome's package; empty for the vendor's
# A file ca-bundle.pem in this folder holds further certificate authorities to trust during the build.
#
# It may run again on a machine that it has run on. A failure is one line that begins with "error: ".
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

software >/dev/null
check_common_settings
bash "$SCRIPTS/base.sh"
while read -r name; do
    say "software: $name"
    bash "$SCRIPTS/software/$name.sh" </dev/null
done < <(software)
bash "$SCRIPTS/clean.sh"
