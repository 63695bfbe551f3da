#!/bin/bash
# FFmpeg of the distribution: ffmpeg and ffprobe.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

install_from_apt ffmpeg
prove ffmpeg -version
prove ffprobe -version
