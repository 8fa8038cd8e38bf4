"""`python tests/schemas/make.py FOLDER`: kuberay.json out of KubeRay's CRD files (ray.io_rayclusters.yaml and so on).

What is kept is the `v1` schema of each kind, as a JSON schema. Descriptions go; a part that occurs several times (a
pod, in every kind) is kept once, in `$defs`. Unknown fields are refused, as `kubectl --validate=strict` does.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import yaml

SHARED_FROM = 400
"""Characters of JSON from which a part is worth a name of its own."""
KEPT = ("type", "enum", "required", "minimum", "maximum", "minItems", "maxItems", "minLength", "maxLength", "pattern")


def converted(schema: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """A structural schema of Kubernetes as a JSON schema; large parts go to `shared`."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made: dict[str, Any] = {name: schema[name] for name in KEPT if name in schema}
    if "items" in schema:
        made["items"] = converted(schema["items"], shared)
    if isinstance(schema.get("additionalProperties"), dict):
        made["additionalProperties"] = converted(schema["additionalProperties"], shared)
    elif "properties" in schema:
        made["properties"] = {name: converted(part, shared) for name, part in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    text = json.dumps(made, sort_keys=True)
    if len(text) < SHARED_FROM:
        return made
    name = hashlib.sha256(text.encode()).hexdigest()[:10]
    shared[name] = made
    return {"$ref": f"#/$defs/{name}"}


def main() -> None:
    """Read the CRDs, write kuberay.json beside this file."""
    shared: dict[str, Any] = {}
    kinds = {}
    for path in sorted(Path(sys.argv[1]).glob("ray.io_*.yaml")):
        crd = yaml.safe_load(path.read_text())["spec"]
        [version] = [version for version in crd["versions"] if version["name"] == "v1"]
        schema = version["schema"]["openAPIV3Schema"]
        # What the API server knows of every object by itself.
        schema["properties"]["metadata"] = {"type": "object"}
        kinds[crd["names"]["kind"]] = converted(schema, shared)
    target = Path(__file__).with_name("kuberay.json")
    target.write_text(json.dumps({"kinds": kinds, "$defs": shared}, sort_keys=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
