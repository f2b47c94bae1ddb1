"""The distributed hash table through which peers find each other: Kademlia with expiring records."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.utils.lazy import lazy_names

if TYPE_CHECKING:
    from shoal.dht.config import DHTConfig
    from shoal.dht.dht import DHT
    from shoal.dht.node import DHTNode
    from shoal.dht.schema import SchemaValidator
    from shoal.dht.types import DHTValue, ValueWithExpiration
    from shoal.dht.validation import (
        CompositeValidator,
        DHTRecord,
        RecordValidatorBase,
        SignatureValidator,
        protected_key,
    )

__all__ = [
    "DHT",
    "DHTNode",
    "DHTConfig",
    "ValueWithExpiration",
    "DHTValue",
    "DHTRecord",
    "RecordValidatorBase",
    "CompositeValidator",
    "SignatureValidator",
    "SchemaValidator",
    "protected_key",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "DHT": "shoal.dht.dht",
        "DHTNode": "shoal.dht.node",
        "DHTConfig": "shoal.dht.config",
        "ValueWithExpiration": "shoal.dht.types",
        "DHTValue": "shoal.dht.types",
        "DHTRecord": "shoal.dht.validation",
        "RecordValidatorBase": "shoal.dht.validation",
        "CompositeValidator": "shoal.dht.validation",
        "SignatureValidator": "shoal.dht.validation",
        "SchemaValidator": "shoal.dht.schema",
        "protected_key": "shoal.dht.validation",
    },
)
