"""All, and only, the package code that imports Ray.

Ray reads its authentication mode and its log level once, when it is imported, so they are settled here, before any module
of this room imports it. A Ray of our own is guarded by a token made for this process; whoever joins a cluster
(RAY_ADDRESS), or sets RAY_AUTH_MODE, has settled it already.
"""

import os
import secrets

if "RAY_ADDRESS" not in os.environ and "RAY_AUTH_MODE" not in os.environ:
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
