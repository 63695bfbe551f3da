#!/bin/bash
# Cursor's agent, by its vendor's installer: the command cursor-agent.
#
# The installer puts it in its user's home, so it runs as the agent's user. It always installs the version that it
# names in its download's address; a pinned version takes that one's place there.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

INSTALLER_URL=${KILN_CURSOR_INSTALLER:-https://cursor.com/install}
HOME_FOLDER=$(getent passwd "$KILN_AGENT_USER" | cut -d: -f6)

# $1: the installer
pin_version() {
    local offered
    offered=$(sed -n 's#.*downloads\.cursor\.com/lab/\([^/$]*\)/.*#\1#p' "$1" | head -n 1)
    [[ -n $offered ]] ||
        fail "cursor $KILN_AGENT_VERSION cannot be installed: the installer at $INSTALLER_URL names no version to replace"
    sed -i "s#${offered//./\\.}#$KILN_AGENT_VERSION#g" "$1"
}

# $1: the installer
run_installer() {
    as_agent_user "$HOME_FOLDER" bash "$1" ||
        fail "cursor cannot be installed: the installer at $INSTALLER_URL failed"
}

installer=$(mktemp)
say "installing cursor $KILN_AGENT_VERSION by $INSTALLER_URL"
fetch cursor "$INSTALLER_URL" "$installer"
[[ $KILN_AGENT_VERSION == latest ]] || pin_version "$installer"
chmod 644 "$installer"
run_installer "$installer"
ln -sfn "$HOME_FOLDER/.local/bin/cursor-agent" /usr/local/bin/cursor-agent
rm "$installer"
