#!/bin/bash
# Google Chrome, by its vendor's package, which adds the vendor's repository for later versions: google-chrome.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

PACKAGE_URL=${KILN_CHROME_PACKAGE:-https://dl.google.com/linux/direct/google-chrome-stable_current_amd64.deb}

folder=$(mktemp -d)
chmod 755 "$folder"
say "installing Google Chrome by $PACKAGE_URL"
fetch chrome "$PACKAGE_URL" "$folder/google-chrome.deb"
apt_get install "$folder/google-chrome.deb" || fail "apt-get could not install Google Chrome's package"
rm -rf "$folder"
prove google-chrome --version
