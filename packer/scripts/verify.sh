#!/bin/bash
# The proof: the agent answers --version to its user, with the pinned version where one is pinned.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

command=$(agent_command)

# A home for the time of the test, so that no agent's first start is in the image.
home=$(mktemp -d -p /var/tmp)
chown "$KILN_AGENT_USER" "$home"
answer=$(as_agent_user "$home" timeout 60 "$command" --version 2>&1) ||
    fail "$command --version fails as user $KILN_AGENT_USER: ${answer##*$'\n'}"
rm -rf "$home"

if [[ $KILN_AGENT_VERSION =~ ^[0-9] && " ${answer//[$'\n()']/ } " != *" $KILN_AGENT_VERSION "* ]]; then
    fail "$command $KILN_AGENT_VERSION was asked for, but it says: $answer"
fi
say "$command answers --version as user $KILN_AGENT_USER: $answer"
