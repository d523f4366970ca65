"""YAML, read strictly: a key that is written twice is a mistake, not the last one's."""

from pathlib import Path
from typing import Any

import yaml


def read(path: str | Path) -> Any:
    """What a YAML file holds. Raises ValueError, in one sentence, for a file that cannot be read, that is not YAML, or
    in which a key appears twice."""
    try:
        return load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


def load(text: str) -> Any:
    """What a YAML text holds. Raises yaml.YAMLError where it is none, or a key appears twice."""
    return yaml.load(text, Loader=_Strict)


class _Strict(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"the key {key.value} appears twice, the second time in line {line}")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else repr(key))
        return super().construct_mapping(node, deep)
