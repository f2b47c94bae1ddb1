"""Options of hivemind's DHT and its node that :class:`shoal.DHT` does not have, each with the reason."""

from __future__ import annotations

from collections.abc import Mapping

LIBP2P_OPTIONS = frozenset(
    {
        "auto_nat", "check_if_identity_free", "conn_manager", "dht_mode", "force_reachability", "idle_timeout",
        "nat_port_map", "no_listen", "persistent_conn_max_msg_size", "quic", "relay_hop_limit", "startup_timeout",
        "tls", "trusted_relays", "use_auto_relay", "use_ipfs", "use_relay", "use_relay_discovery", "use_relay_hop",
    }
)  # fmt: skip
"""Options of hivemind that its libp2p daemon had; Shoal has no such daemon."""

TUNING_OPTIONS = frozenset(
    {"backoff_rate", "blacklist_time", "chunk_size", "depth_modulo", "num_workers", "strict"}
)  # fmt: skip
"""Options of hivemind that tune its own implementation, and have no counterpart here."""

IGNORED: Mapping[str, str] = {
    **dict.fromkeys(LIBP2P_OPTIONS, "it belongs to hivemind's libp2p daemon, and Shoal needs none"),
    **dict.fromkeys(TUNING_OPTIONS, "it tunes hivemind's implementation, and has no counterpart here"),
}
"""Option -> why a DHT that is given it warns and goes on."""

REFUSED: Mapping[str, str] = {
    "authorizer": "Shoal has no authorizers yet, and will not start a DHT without one that was asked for",
    "node_id": "a node's id follows from its identity; use identity_path to keep it",
    "p2p": "the DHT makes its own host",
    "protocol": "the DHT makes its own",
    "record_validator": "it is called record_validators, and takes several",
    "listen": "use client_mode=True instead of listen=False",
    "listen_on": "use host_maddrs",
}
"""Option -> why a DHT that is given it is an error, and what to do instead."""
