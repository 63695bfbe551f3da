#!/usr/bin/env bash
# Set-up that is missing on a plain Debian; the Makefile calls it.
#
#   scripts/setup.sh venv DIRECTORY   makes a virtual environment of Python 3.11 or later
#   scripts/setup.sh packer           installs Packer unless KILN_PACKER, or `packer`, is there
#   scripts/setup.sh containers       installs what container builds need; they are off where it cannot be had
#   scripts/setup.sh test-tools       installs what some tests need; those are skipped where it cannot be had
#   scripts/setup.sh bench-tools      installs what some benchmarks compare with
set -euo pipefail
# Where Debian keeps what only root uses; not every PATH has it.
export PATH=$PATH:/usr/sbin:/sbin

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

# $1: the program that is looked for; $2: what its lack means; the rest: the command that installs it.
optional() {
    local program=$1 lack=$2
    shift 2
    command -v "$program" >/dev/null || ("$@") || say "no $program: $lack"
}

# $1: a package whose service ($2, or the same name) is not wanted: it would take a port, now and after the next boot.
install_unstarted() {
    local policy=/usr/sbin/policy-rc.d made= service=${2:-$1}
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
        as_root chmod +x "$policy"
        made=yes
    fi
    apt_install "$1" && as_root update-rc.d "$service" disable >/dev/null 2>&1 || true
    [ -z "$made" ] || as_root rm -f "$policy"
    command -v "$service" >/dev/null
}

has_buildx() {
    ${KILN_BUILDX:-docker buildx} version >/dev/null 2>&1
}

# From Debian 13 on, the plugin is a package; before, that package's program works with the older engine.
install_buildx() {
    if apt-cache show docker-buildx >/dev/null 2>&1; then
        apt_install docker-buildx
        has_buildx && return
    fi
    unpack_buildx
    has_buildx
}

# The package comes from the mirror of Debian that this machine has its own packages from, by lists of its own:
# the machine's remain those of its release.
unpack_buildx() {
    local mirror folder options
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Identifier: Packages' 'Origin: Debian' 'Label: Debian' | head -n 1)
    [ -n "$mirror" ] || fail "this machine has no packages from Debian: install docker's buildx plugin by hand"
    say "installing docker's buildx plugin from Debian 13"
    folder=$(mktemp -d)
    # shellcheck disable=SC2064  the folder's name is this function's own
    trap "rm -rf '$folder'" EXIT
    chmod 755 "$folder"
    mkdir -p "$folder/lists/partial" "$folder/cache/archives/partial"
    printf 'Types: deb\nURIs: %s\nSuites: trixie\nComponents: main\nSigned-By: %s\n' "$mirror" \
        /usr/share/keyrings/debian-archive-keyring.gpg >"$folder/trixie.sources"
    options=(-q -o Dir::Etc::sourceparts=/dev/null -o "Dir::Etc::sourcelist=$folder/trixie.sources"
        -o "Dir::State::lists=$folder/lists" -o "Dir::Cache=$folder/cache" -o APT::Sandbox::User=root)
    apt-get "${options[@]}" update &&
        (cd "$folder" && apt-get "${options[@]}" download docker-buildx) &&
        dpkg-deb -x "$folder"/docker-buildx_*.deb "$folder/package" &&
        install_plugin "$folder/package/usr/libexec/docker/cli-plugins/docker-buildx"
}

# Where Docker looks for plugins whoever runs it; else where it looks for this user's.
install_plugin() {
    if [ "$(id -u)" -eq 0 ] || command -v sudo >/dev/null; then
        as_root install -D -m 755 "$1" /usr/local/lib/docker/cli-plugins/docker-buildx
    else
        install -D -m 755 "$1" "${DOCKER_CONFIG:-$HOME/.docker}/cli-plugins/docker-buildx"
    fi
}

install_containers() {
    local off="container builds are off"
    case "${KILN_CONTAINERS:-true}" in false | False | FALSE | 0 | no | off) return ;; esac
    optional docker "$off" apt_install docker.io
    if [ -z "${DOCKER_HOST:-}${KILN_ENGINE_HOSTS:-}" ]; then
        optional dockerd "$off" apt_install docker.io
        optional ip "$off" apt_install iproute2
        optional iptables "builds have no network" apt_install iptables
    fi
    [ -n "${KILN_REGISTRY:-}" ] || optional docker-registry "$off" install_unstarted docker-registry
    optional "${KILN_SKOPEO:-skopeo}" "transfers are off" apt_install skopeo
    has_buildx || (install_buildx) || say "no docker buildx: $off"
}

has_static_busybox() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' busybox-static 2>/dev/null)" = installed ]
}

install_test_tools() {
    local lack="the tests that need it are skipped"
    has_postgresql || (install_postgresql) || say "no PostgreSQL: $lack"
    has_static_busybox || (apt_install busybox-static) || say "no static busybox: $lack"
    optional docker "$lack" apt_install docker.io
    optional ip "$lack" apt_install iproute2
    optional mmdebstrap "$lack" apt_install mmdebstrap
    optional redis-server "$lack" install_unstarted redis-server
}

install_bench_tools() {
    local lack="the rows that need it are not measured"
    has_static_busybox || (apt_install busybox-static) || say "no static busybox: $lack"
    optional nginx "$lack" install_unstarted nginx-light nginx
    has_postgresql || (install_postgresql) || say "no PostgreSQL: $lack"
}

case "${1:-}" in
    venv) make_venv "${2:?a directory}" ;;
    packer) install_packer ;;
    containers) install_containers ;;
    test-tools) install_test_tools ;;
    bench-tools) install_bench_tools ;;
    *) fail "one of: venv DIRECTORY, packer, containers, test-tools, bench-tools" ;;
esac
