#!/usr/bin/env bash
# Set-up that is missing on a plain Debian; the Makefile calls it.
#
#   scripts/setup.sh venv DIRECTORY   makes a virtual environment of Python 3.11 or later
#   scripts/setup.sh packer           installs Packer unless KILN_PACKER, or `packer`, is there
#   scripts/setup.sh test-tools       installs what some tests need; those are skipped where it cannot be had
set -euo pipefail

say() { echo "setup: $*" >&2; }
fail() { say "$*"; exit 1; }

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    else
        sudo "$@"
    fi
}

apt_install() {
    command -v apt-get >/dev/null || fail "there is no apt-get here: install $* by hand"
    [ "$(id -u)" -eq 0 ] || command -v sudo >/dev/null || fail "as root: apt-get install $*"
    say "installing $* by apt-get"
    if [ -z "${apt_updated:-}" ]; then
        as_root apt-get update -q || say "apt-get update failed; going on with the lists that are there"
        apt_updated=yes
    fi
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@" </dev/null
}

is_recent_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

can_make_venvs() {
    "$1" -c 'import ensurepip, venv' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.11 python3 python3.12 python3.13 python3.14; do
        if command -v "$candidate" >/dev/null && is_recent_python "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

make_venv() {
    local python
    is_recent_python "$1/bin/python" && "$1/bin/python" -m pip --version >/dev/null 2>&1 && return
    python=$(find_python) || { apt_install python3 python3-venv && python=$(find_python); } ||
        fail "Python 3.11 or later is needed: set PYTHON to one"
    can_make_venvs "$python" || apt_install python3-venv
    can_make_venvs "$python" || fail "$python cannot make virtual environments: install its venv package"
    say "making $1 with $("$python" --version)"
    "$python" -m venv --clear "$1"
}

install_packer() {
    local packer=${KILN_PACKER:-packer}
    command -v "$packer" >/dev/null && return
    [ "$packer" = packer ] || fail "KILN_PACKER: there is no $packer"
    apt_install packer || fail "Packer is needed: install it, and set KILN_PACKER if it is not in PATH"
}

# Only the server's programs are used: the package's own cluster is neither made nor started.
install_postgresql() {
    local settings=/etc/postgresql-common/createcluster.conf saved
    apt_install postgresql-common
    saved=$(mktemp)
    cp "$settings" "$saved"
    echo 'create_main_cluster = false' | as_root tee -a "$settings" >/dev/null
    apt_install postgresql || say "PostgreSQL cannot be installed"
    as_root cp "$saved" "$settings"
    rm -f "$saved"
}

has_postgresql() {
    command -v postgres >/dev/null || compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null
}

# $1: the program that is looked for; the rest: the command that installs it.
optional() {
    local program=$1
    shift
    command -v "$program" >/dev/null || ("$@") || say "no $program: the tests that need it are skipped"
}

install_test_tools() {
    has_postgresql || (install_postgresql) || say "no PostgreSQL: the tests that need it are skipped"
    optional docker apt_install docker.io
    optional ip apt_install iproute2
    optional mmdebstrap apt_install mmdebstrap
}

case "${1:-}" in
    venv) make_venv "${2:?a directory}" ;;
    packer) install_packer ;;
    test-tools) install_test_tools ;;
    *) fail "one of: venv DIRECTORY, packer, test-tools" ;;
esac
