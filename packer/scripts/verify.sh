#!/bin/bash
# The proof: the agent answers --version to its user, with the pinned version where one is pinned.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

command=$(agent_command)

answer=$(answer_to_agent_user "$command" --version) ||
    fail "$command --version fails as user $KILN_AGENT_USER: ${answer##*$'\n'}"

if [[ $KILN_AGENT_VERSION =~ ^[0-9] && " ${answer//[$'\n()']/ } " != *" $KILN_AGENT_VERSION "* ]]; then
    fail "$command $KILN_AGENT_VERSION was asked for, but it says: $answer"
fi
say "$command answers --version as user $KILN_AGENT_USER: $answer"
