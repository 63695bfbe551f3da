#!/bin/bash
# An XFCE desktop that a client of the Remote Desktop Protocol sees: xrdp, on port 3389.
#
# Whoever logs in there needs a password, and no user has one until it is given one on the machine.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

# XFCE says nothing without a screen: this is one as xrdp makes it, in no window.
# shellcheck disable=SC2016  # the user's shell expands it
SESSION_ON_A_SCREEN='
    /usr/lib/xorg/Xorg :99 -config xrdp/xorg.conf -nolisten tcp -logfile ~/log >/dev/null 2>&1 &
    for _ in $(seq 100); do [ -S /tmp/.X11-unix/X99 ] && break; sleep 0.1; done
    DISPLAY=:99 xfce4-session --version 2>&1 | grep "^xfce4-session [0-9]"
    said=$?
    kill $! && wait
    exit $said
'

prove_session() {
    local answer
    answer=$(answer_to_agent_user sh -c "$SESSION_ON_A_SCREEN") || fail "XFCE does not start as user $KILN_AGENT_USER"
    say "XFCE starts on a screen of xrdp's as user $KILN_AGENT_USER: $answer"
}

install_from_apt xfce4 xfce4-terminal xrdp xorgxrdp dbus-x11 adwaita-icon-theme fonts-dejavu-core
# The key of the machine's own certificate is readable for this group.
adduser --quiet xrdp ssl-cert
prove_session
prove xrdp --version
