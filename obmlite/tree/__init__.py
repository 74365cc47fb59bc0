"""Pytrees as data. ``structure`` has the tree; the rest is how one is made, named and kept."""

from obmlite.tree.described import from_columns, to_columns
from obmlite.tree.filling import filler, plain
from obmlite.tree.flattening import flatten, flatten_arguments
from obmlite.tree.names import MAX_NAME, RESERVED, Key, KeyKind, escape, join, key_from_text, key_text, split_name
from obmlite.tree.nodes import Adapter, Registration, add_adapter, is_foreign, register_node
from obmlite.tree.static import MAX_STATIC_BYTES, pack_static, unpack_static
from obmlite.tree.structure import MAX_DEPTH, MAX_NODES, Kind, Tree

__all__ = [
    "MAX_DEPTH",
    "MAX_NAME",
    "MAX_NODES",
    "MAX_STATIC_BYTES",
    "RESERVED",
    "Adapter",
    "Key",
    "KeyKind",
    "Kind",
    "Registration",
    "Tree",
    "add_adapter",
    "escape",
    "filler",
    "flatten",
    "flatten_arguments",
    "from_columns",
    "is_foreign",
    "join",
    "key_from_text",
    "key_text",
    "pack_static",
    "plain",
    "register_node",
    "split_name",
    "to_columns",
    "unpack_static",
]
