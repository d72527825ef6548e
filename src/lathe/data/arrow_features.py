"""Arrow features: what `datasets` says of the columns of an Arrow or Parquet file beside their types.

It keeps classes as numbers with names, and values of mixed types as JSON text (its feature Json). Arrow itself gives
every object of a column all of the keys that one of them has, with null where a key is missing.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

Decode = Callable[[Any], Any]

LISTS = ("is_list", "is_large_list", "is_fixed_size_list", "is_list_view", "is_large_list_view")  # of pyarrow.types
JSON_EXTENSION = "arrow.json"


def read_features(schema: Any) -> dict[str, Any]:
    """Return the features that `datasets` keeps in the metadata of a schema, by column; {} if it wrote none."""
    described = (schema.metadata or {}).get(b"huggingface")
    features = json.loads(described).get("info", {}).get("features") if described else None
    return features if isinstance(features, dict) else {}


def get_label_names(schema: Any) -> dict[str, list[str]]:
    """Return the class names by column, of the columns that hold numbers of classes."""
    return {
        column: feature["names"]
        for column, feature in read_features(schema).items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and column in schema.names
    }


def make_decoders(schema: Any) -> dict[str, Decode]:
    """Return a function by column, of the columns that hold JSON text or objects.

    JSON text is decoded. Of an object, keys with null are left out: there is no telling whether the null was in the
    data, or is Arrow's.
    """
    features = read_features(schema)
    made = {field.name: _make_decoder(field.type, features.get(field.name)) for field in schema}
    return {column: decode for column, decode in made.items() if decode}


def _make_decoder(arrow_type: Any, feature: Any) -> Decode | None:
    import pyarrow

    is_json = isinstance(feature, Mapping) and feature.get("_type") == "Json"
    if is_json or getattr(arrow_type, "extension_name", None) == JSON_EXTENSION:
        return _decode_json
    if pyarrow.types.is_struct(arrow_type):
        inner = feature if isinstance(feature, Mapping) else {}
        fields = [arrow_type.field(index) for index in range(arrow_type.num_fields)]
        by_key = {field.name: _make_decoder(field.type, inner.get(field.name)) for field in fields}
        return lambda value: _decode_object(value, by_key)
    if pyarrow.types.is_map(arrow_type):
        decode_item = _make_decoder(arrow_type.item_type, None)
        return lambda value: _decode_map(value, decode_item)
    if any(getattr(pyarrow.types, is_list)(arrow_type) for is_list in LISTS):
        item = feature.get("feature") if isinstance(feature, Mapping) else None
        if isinstance(feature, list) and feature:  # as older versions of `datasets` write a list
            item = feature[0]
        decode = _make_decoder(arrow_type.value_type, item)
        return decode and (lambda value: value if value is None else [decode(one) for one in value])
    return None


def _decode_map(value: Any, decode: Decode | None) -> Any:
    """Return an object of Arrow's pairs; its keys with null are in the data."""
    if value is None:
        return None
    return {key: decode(inner) if decode else inner for key, inner in value}


def _decode_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value  # as it is: a fault of the row, which its format names


def _decode_object(value: Any, by_key: Mapping[str, Decode | None]) -> Any:
    if value is None:
        return None
    decoded = {key: decode(value[key]) if (decode := by_key.get(key)) else value[key] for key in value}
    return {key: inner for key, inner in decoded.items() if inner is not None}
