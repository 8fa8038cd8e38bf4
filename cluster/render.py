"""`python cluster/render.py cluster/kuberay/FILE [--image IMAGE] | kubectl apply -f -`: a manifest, complete.

The cluster of all jobs is described once, in raycluster.yaml. Two tags of ours take a part of another file in:

    !spec FILE   the `spec` of the one manifest in FILE
    !text FILE   FILE, rendered, as a string (what a ConfigMap holds)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

DEFAULT_IMAGE = "curation:0.1.0"


def render(path: Path, *, image: str = DEFAULT_IMAGE) -> list[dict[str, Any]]:
    """The manifests of a file, with every tag resolved and every container of ours from `image`."""

    class Loader(yaml.SafeLoader):
        """PyYAML keeps tags by class, and ours know the folder."""

    def spec(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
        [manifest] = render(path.parent / str(loader.construct_scalar(node)), image=image)
        return manifest["spec"]

    def text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
        return dump(render(path.parent / str(loader.construct_scalar(node)), image=image))

    Loader.add_constructor("!spec", spec)
    Loader.add_constructor("!text", text)
    return [_with_image(manifest, image) for manifest in yaml.load_all(path.read_text(), Loader)]


def dump(manifests: list[dict[str, Any]]) -> str:
    """Manifests as YAML."""
    return yaml.dump_all(manifests, Dumper=_Plain, sort_keys=False)


class _Plain(yaml.SafeDumper):
    """Writes every part out, where PyYAML would point back to the same one."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _with_image(value: Any, image: str) -> Any:
    if isinstance(value, dict):
        ours = {"image": image} if value.get("image") == DEFAULT_IMAGE else {}
        return {name: _with_image(part, image) for name, part in value.items()} | ours
    return [_with_image(part, image) for part in value] if isinstance(value, list) else value


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser("cluster/render.py", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--image", default=DEFAULT_IMAGE)
    given = parser.parse_args()
    sys.stdout.write(dump(render(given.file, image=given.image)))


if __name__ == "__main__":
    main()
