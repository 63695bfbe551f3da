#!/bin/bash
# VS Code in the browser, from the npm registry: the command code-server.
#
# Parts of it are compiled here, against the headers that come with Node.js; its compilers go again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

# $1: a folder to unpack them in
fetch_node_headers() {
    local package
    package=node-linux-$(node --print process.arch)@$(node --print process.versions.node)
    (cd "$1" && npm pack --silent "$package" >/dev/null && tar -xzf ./*.tgz) || fail "npm could not fetch $package"
}

compile_code_server() {
    local before staging log
    before=$(installed_packages)
    staging=$(mktemp -d)
    log=$staging/log
    apt_get install g++ make python3 pkg-config libkrb5-dev || fail "apt-get could not install a compiler"
    fetch_node_headers "$staging"
    # It prints thousands of warnings of compilers.
    NPM_CONFIG_NODEDIR=$staging/package npm install --global --loglevel=error code-server >"$log" 2>&1 ||
        { tail -n 20 "$log" >&2; fail "npm could not install code-server from $(npm config get registry)"; }
    purge_packages_since "$before"
    rm -rf "$staging"
}

bash "$SCRIPTS/node.sh"
set_up_npm
if ! command -v code-server >/dev/null; then
    say "installing code-server"
    compile_code_server
fi
prove code-server --version
