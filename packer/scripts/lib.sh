# What the scripts share. To be sourced.
# shellcheck shell=bash

SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SYSTEM_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt

# In other locales, [a-z] holds capitals and accents.
export LC_ALL=C

KILN_PROVIDER=${KILN_PROVIDER:-}
KILN_AGENT_VERSION=${KILN_AGENT_VERSION:-latest}
KILN_AGENT_USER=${KILN_AGENT_USER:-agent}
KILN_SOFTWARE=${KILN_SOFTWARE:-}
KILN_EXTRA_PACKAGES=${KILN_EXTRA_PACKAGES:-}
KILN_NPM_REGISTRY=${KILN_NPM_REGISTRY:-}
KILN_NPM_TOKEN=${KILN_NPM_TOKEN:-}

say() {
    echo "==> $*"
}

fail() {
    echo "error: $*" >&2
    exit 1
}

# The templates check the same; these scripts also serve templates that don't.
check_settings() {
    check_provider
    check_common_settings
}

# What every image is made with, whatever comes into it.
check_common_settings() {
    [[ $KILN_AGENT_VERSION =~ ^[0-9A-Za-z][0-9A-Za-z._+-]*$ ]] || fail "not a version: '$KILN_AGENT_VERSION'"
    [[ $KILN_AGENT_USER =~ ^[a-z_][a-z0-9_-]{0,31}$ ]] || fail "not a user name: '$KILN_AGENT_USER'"
    [[ $KILN_AGENT_USER != root ]] || fail "the agent must not run as root"
    extra_packages >/dev/null
    [[ $(id -u) == 0 ]] || fail "these scripts need root"
    command -v apt-get >/dev/null || fail "these scripts need Debian or Ubuntu: there is no apt-get"
}

check_provider() {
    local known
    known=$(cd "$SCRIPTS/agents" && printf '%s ' *.sh | sed 's/\.sh//g; s/ $//; s/ /, /g')
    [[ $KILN_PROVIDER =~ ^[a-z][a-z-]*$ && -f $SCRIPTS/agents/$KILN_PROVIDER.sh ]] ||
        fail "unknown provider '$KILN_PROVIDER'; known are $known"
}

# One script's name a line, in the order that was asked for.
software() {
    local name names
    IFS=$' ,\t\n' read -r -d '' -a names <<<"$KILN_SOFTWARE" || true
    for name in "${names[@]}"; do
        [[ $name =~ ^[a-z0-9][a-z0-9-]*$ && -f $SCRIPTS/software/$name.sh ]] || fail "unknown software '$name'"
        echo "$name"
    done
}

# One package name a line. A trailing - would make apt remove the package, and anything else might be an option.
extra_packages() {
    local name names
    IFS=$' ,\t\n' read -r -d '' -a names <<<"$KILN_EXTRA_PACKAGES" || true
    for name in "${names[@]}"; do
        [[ $name =~ ^[a-z0-9][a-z0-9+.-]*[a-z0-9+]$ ]] || fail "not a Debian package name: '$name'"
        echo "$name"
    done
}

# The command that starts the agent.
agent_command() {
    case $KILN_PROVIDER in
    claude-code) echo claude ;;
    cursor) echo cursor-agent ;;
    *) echo "$KILN_PROVIDER" ;;
    esac
}

# Silent, but for the reason of a failure. Pattern-Only, because apt takes an unknown name with a dot in it for a
# regular expression.
apt_get() {
    local output
    output=$(DEBIAN_FRONTEND=noninteractive apt-get --quiet=2 --yes --no-install-recommends \
        -o Acquire::Retries=3 -o Acquire::https::CaInfo="${CURL_CA_BUNDLE:-$SYSTEM_CA_BUNDLE}" \
        -o APT::Cmd::Pattern-Only=true -o DPkg::Lock::Timeout=300 "$@" 2>&1) && return 0
    tail -n 20 <<<"$output" >&2
    return 1
}

# Runs a command as the agent's user, with none of this build's settings but the CA bundle. $1: its home; then the command
as_agent_user() {
    local home=$1 bundle=${CURL_CA_BUNDLE:-$SYSTEM_CA_BUNDLE}
    shift
    runuser -u "$KILN_AGENT_USER" -- env -i HOME="$home" NODE_DISABLE_COMPILE_CACHE=1 CURL_CA_BUNDLE="$bundle" \
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@" </dev/null
}

# All that a command says to the agent's user, in a home for the time of the test, so that no program's first start is in
# the image. Fails as the command does. $@: the command
answer_to_agent_user() {
    local home code=0
    home=$(mktemp -d -p /var/tmp)
    chown "$KILN_AGENT_USER" "$home"
    as_agent_user "$home" timeout 60 "$@" 2>&1 || code=$?
    rm -rf "$home"
    return "$code"
}

# The proof that a program works for who is not root. $@: the command that prints its version
prove() {
    local answer version
    answer=$(answer_to_agent_user "$@") || fail "$* fails as user $KILN_AGENT_USER: ${answer##*$'\n'}"
    # The first line with a version in it: some print notes and times before.
    version=$(grep --max-count 1 --extended-regexp '(^|[^0-9:.])[0-9]+\.[0-9]+' <<<"$answer") ||
        fail "$* names no version: ${answer##*$'\n'}"
    say "$* answers as user $KILN_AGENT_USER: $version"
}

# Installs packages of the distribution. $@: their names
install_from_apt() {
    say "installing $*"
    apt_get install "$@" || fail "apt-get could not install: $*"
}

# Fetches what only a vendor's own site has. $1: what is to be installed; $2: the address; $3: the file to write
fetch() {
    local reason
    reason=$(curl --fail --silent --show-error --location --connect-timeout 15 --max-time 300 --output "$3" "$2" 2>&1) ||
        fail "$1 cannot be installed: $2 cannot be fetched: ${reason##*$'\n'}"
}

installed_packages() {
    dpkg-query --show --showformat '${db:Status-Abbrev} ${Package}\n' | sed -n 's/^ii *//p' | sort
}

# curl's variable replaces the system's authorities, Node's adds to them: one file with both serves all. The system has
# none until ca-certificates is installed.
trust_ca_bundle() {
    local extra=$SCRIPTS/ca-bundle.pem all=$SCRIPTS/all-ca-bundle.pem
    [[ -f $extra ]] || return 0
    cat "$extra" "$SYSTEM_CA_BUNDLE" >"$all" 2>/dev/null || true
    chmod 644 "$all"
    export CURL_CA_BUNDLE=$all SSL_CERT_FILE=$all NODE_EXTRA_CA_CERTS=$all
}

# Removes what only a step of the build needed. $1: what installed_packages said before it
purge_packages_since() {
    local new
    mapfile -t new < <(comm -13 <(echo "$1") <(installed_packages))
    apt_get purge "${new[@]}" || fail "apt-get could not remove again: ${new[*]}"
}

# The token stays in the environment: the file only says where npm finds it.
set_up_npm() {
    local home=$SCRIPTS/npm registry
    mkdir -p "$home"
    export NPM_CONFIG_CACHE=$home/cache NPM_CONFIG_USERCONFIG=$home/npmrc NPM_CONFIG_LOGS_MAX=0
    export NPM_CONFIG_AUDIT=false NPM_CONFIG_FUND=false NPM_CONFIG_UPDATE_NOTIFIER=false
    export NODE_NO_WARNINGS=1 NODE_DISABLE_COMPILE_CACHE=1
    [[ -z $KILN_NPM_REGISTRY ]] || export NPM_CONFIG_REGISTRY=$KILN_NPM_REGISTRY
    [[ -n $KILN_NPM_TOKEN ]] || return 0
    registry=$(npm config get registry)
    registry=${registry%/}
    echo "//${registry#*://}/:_authToken=\${KILN_NPM_TOKEN}" >"$home/npmrc"
}

# Installs a package of the npm registry for every user. $1: its name
install_from_npm() {
    bash "$SCRIPTS/node.sh"
    set_up_npm
    say "installing $1@$KILN_AGENT_VERSION"
    npm install --global --loglevel=error "$1@$KILN_AGENT_VERSION" ||
        fail "npm could not install $1@$KILN_AGENT_VERSION from $(npm config get registry)"
}

# Installs an agent at its latest version, and proves it. $1: a file of agents/, without .sh
install_agent() {
    export KILN_PROVIDER=$1 KILN_AGENT_VERSION=latest
    bash "$SCRIPTS/agents/$1.sh"
    bash "$SCRIPTS/verify.sh"
}

trust_ca_bundle
