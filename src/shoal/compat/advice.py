"""Names of hivemind that Shoal does not have, and what to use instead.

They are listed by the package, or the class of the object, in which a user of hivemind would look for them;
docs/migration.md says more.
"""

from __future__ import annotations

from collections.abc import Mapping

_POWER_SGD = "use shoal.optim.GradientAverager(compression=shoal.Uniform8BitQuantization()), for fewer bytes"
_EXPERTS = (
    "Shoal averages tensors and has no mixture of experts; hivemind's servers and experts stay with hivemind"
)
_LIBP2P = "Shoal has its own transport and no libp2p daemon"
_SERVICER = f"{_LIBP2P}; calls of your own: node.host.serve() and node.host.call() inside dht.run_coroutine()"
_PROTOBUF = "Shoal has no protobuf messages; they are msgspec Structs that only Shoal itself sends"
_ASYNC_HELPER = "use asyncio itself: StepControl and MPFuture can be awaited in any event loop"
_NESTED = "Shoal takes any iterable of tensors; torch.utils._pytree and optree flatten nested structures"
_LOGGING = (
    "Shoal logs to the loggers 'shoal...' of the logging module: configure them there, or with SHOAL_LOGLEVEL"
)
_CRYPTO = "identities are Ed25519 keys in the file that DHT(identity_path=...) names"
_INTERNALS = "rounds run in the background process; step() runs one, and its report says what happened in it"

ABSENT: Mapping[str, Mapping[str, str]] = {
    "shoal": {
        "TrainingStateAverager": "use shoal.optim.TrainingStateAverager",
        "CollaborativeOptimizer": "use shoal.Optimizer",
        "DecentralizedOptimizer": "use shoal.Optimizer",
        "GradientAverager": "use shoal.optim.GradientAverager",
        "PowerSGDGradientAverager": _POWER_SGD,
        "moe": _EXPERTS,
        "Server": _EXPERTS,
        "ModuleBackend": _EXPERTS,
        "RemoteExpert": _EXPERTS,
        "RemoteMixtureOfExperts": _EXPERTS,
        "RemoteSwitchMixtureOfExperts": _EXPERTS,
        "register_expert_class": _EXPERTS,
        "proto": _PROTOBUF,
        "hivemind_cli": "the command line is `shoal`: `shoal peer` runs a DHT node, as hivemind-dht does",
        "P2P": _LIBP2P,
        "P2PContext": _LIBP2P,
        "LOCALHOST": "write '127.0.0.1'",
    },
    "shoal.averaging": {
        "TrainingAverager": "use shoal.TrainingAverager",
        "GradientAverager": "use shoal.optim.GradientAverager",
        "group_info": "GroupInfo is shoal.averaging.GroupInfo",
        "key_manager": "see get_group_bits() and set_group_bits() of shoal.DecentralizedAverager",
        "GroupKeyManager": "see get_group_bits() and set_group_bits() of shoal.DecentralizedAverager",
        "AllReduceRunner": _INTERNALS,
        "Matchmaking": _INTERNALS,
        "TensorPartContainer": _INTERNALS,
        "TensorPartReducer": _INTERNALS,
        "BannedException": "members that a round went on without are in StepControl.report.excluded",
        "GatheredData": "anything that shoal.utils.MSGPackSerializer encodes; write typing.Any",
        "GroupID": "write bytes",
    },
    "shoal.dht": {
        "DHTID": "ids are integers that follow from keys and PeerIDs; for a random name use uuid.uuid4().hex",
        "DHTProtocol": "calls between nodes are internal; dht.run_coroutine() gives you the node",
        "RSASignatureValidator": "use shoal.dht.SignatureValidator, which signs with Ed25519",
        "BytesWithPublicKey": (
            "use bytes: SignatureValidator checks owners; keys of shoal.dht.protected_key() are each peer's own"
        ),
        "conbytes": "use Annotated[bytes, msgspec.Meta(...)], or pydantic's own types",
        "crypto": "shoal.dht.SignatureValidator takes the place of RSASignatureValidator",
        "protocol": "calls between nodes are internal; dht.run_coroutine() gives you the node",
        "traverse": "searches are internal; dht.get() runs one",
    },
    "shoal.compression": {
        "serialize_torch_tensor": "use shoal.compression.serialize_tensor(tensor, codec)",
        "deserialize_torch_tensor": "use shoal.compression.deserialize_tensor(serialized)",
        "deserialize_tensor_stream": "use shoal.compression.deserialize_tensor(serialized) for each tensor",
        "serialization": "use shoal.compression.serialize_tensor and deserialize_tensor",
        "BASE_COMPRESSION_TYPES": "codecs are registered by number: shoal.compression.get_codec(number)",
    },
    "shoal.optim": {
        "PowerSGDGradientAverager": _POWER_SGD,
        "power_sgd_averager": _POWER_SGD,
    },
    "shoal.p2p": {
        "P2P": _SERVICER,
        "P2PContext": _SERVICER,
        "ServicerBase": _SERVICER,
        "StubBase": _SERVICER,
        "PeerInfo": "dht.peer_id and dht.get_visible_maddrs() say who a peer is and where",
        "P2PDaemonError": f"{_LIBP2P}; see PeerUnreachable and ConnectionLost in shoal.errors",
        "P2PHandlerError": "use shoal.errors.RemoteError",
        "p2p_daemon": _LIBP2P,
        "p2p_daemon_bindings": f"{_LIBP2P}; PeerID is shoal.p2p.PeerID",
        "servicer": _SERVICER,
    },
    "shoal.utils": {
        "as_aiter": _ASYNC_HELPER,
        "amap_in_executor": _ASYNC_HELPER,
        "switch_to_uvloop": _ASYNC_HELPER,
        "enter_asynchronously": _ASYNC_HELPER,
        "asyncio": _ASYNC_HELPER,
        "nested_flatten": _NESTED,
        "nested_pack": _NESTED,
        "nested_map": _NESTED,
        "nested": _NESTED,
        "PerformanceEMA": "use shoal.optim.PerformanceEMA",
        "performance_ema": "use shoal.optim.PerformanceEMA",
        "TensorDescriptor": "shoal.compression.CompressionInfo holds shape and dtype itself",
        "BatchTensorDescriptor": "shoal.compression.CompressionInfo holds shape and dtype itself",
        "tensor_descr": "shoal.compression.CompressionInfo holds shape and dtype itself",
        "TimedStorage": "the DHT's storage is internal; dht.store() and dht.get() use it",
        "timed_storage": "get_dht_time, ValueWithExpiration and DHTExpiration are in shoal.utils itself",
        "MAX_DHT_TIME_DISCREPANCY_SECONDS": (
            "clocks of peers may differ by any time: peers measure the difference and go by a time of their own"
        ),
        "mpfuture": "MPFuture is shoal.utils.MPFuture",
        "streaming": "Shoal streams tensors by itself",
        "multiaddr": "Multiaddr is shoal.p2p.Multiaddr",
        "crypto": _CRYPTO,
        "auth": "Shoal has no authorizers; SignatureValidator and other record validators restrict who may write what",
        "limits": (
            "Shoal needs few open files: instead of increase_file_limit() use resource.setrlimit(), if at all"
        ),
        "networking": (
            "instead of log_visible_maddrs() use print(*dht.get_visible_maddrs()), which others take as initial_peers; "
            "instead of choose_ip_address() give the address that you want in DHT(host_maddrs=...)"
        ),
        "math": "use torch.linalg.qr to orthogonalize",
    },
}
"""Package -> name -> what to use instead."""

_TYPES = "it is an alias for type checkers: write bytes or typing.Any"
_STORAGE = "the DHT's storage is internal; dht.store() and dht.get() use it"
_OWN_CODEC = "it is internal to hivemind's codecs; those of Shoal have settings of their own (docs/api.md)"

ABSENT_IN_MODULES: Mapping[str, str] = {
    **dict.fromkeys(
        ("achain", "aiter_with_timeout", "anext", "azip", "attach_event_on_finished", "cancel_and_wait"),
        _ASYNC_HELPER,
    ),
    **dict.fromkeys(("averaging_pb2", "runtime_pb2"), _PROTOBUF),
    **dict.fromkeys(("combine_from_streaming", "split_for_streaming"), "Shoal streams tensors by itself"),
    **dict.fromkeys(
        ("GroupKey", "KeyType", "ValueType", "DHTKey", "Subkey", "BinaryDHTValue", "ReturnType", "Key"), _TYPES
    ),
    **dict.fromkeys(("DictionaryDHTValue", "DHTLocalStorage", "CacheRefreshQueue"), _STORAGE),
    **dict.fromkeys(("Blacklist", "KBucket", "traverse_dht"), "searches are internal; dht.get() runs one"),
    **dict.fromkeys(
        (
            "USE_LEGACY_BFLOAT16", "BNB_MISSING_MESSAGE", "EXECUTOR", "average_buckets", "get_chunk_size",
            "get_num_bits", "quantile_qq_approximation",
        ),
        _OWN_CODEC,
    ),
    **dict.fromkeys(
        (
            "CustomFormatter", "HandlerMode", "TRUE_CONSTANTS", "TextStyle", "always_log_caller",
            "golog_level_to_python", "in_ipython", "loglevel", "python_level_to_golog",
        ),
        _LOGGING,
    ),
    **dict.fromkeys(
        ("LOAD_BALANCING_LP_DECIMALS", "hagenbach_bishoff", "optimize_parts_lp"),
        "shoal.averaging.load_balance_peers computes the exact optimum by itself",
    ),
    "AuthorizerBase": "Shoal has no authorizers; record validators restrict who may write what",
    "DEFAULT_NUM_WORKERS": "there is no such limit; DHT(parallel_rpc=...) limits the calls of one search",
    "DEFAULT_PART_SIZE_BYTES": "give part_size_bytes to shoal.DecentralizedAverager",
    "PotentialLeaders": _INTERNALS,
    "compute_schema_hash": "peers that do not fit are named by the error of a step that found no group",
}  # fmt: skip
"""Name -> what to use instead, for what hivemind has only inside of modules (:mod:`shoal.compat.modules`)."""

_PROCESS_OF_DHT = "the process is that of the DHT: dht.background"
_PROCESS: Mapping[str, str] = {
    "start": "use run_in_background()",
    "run": _INTERNALS,
    "terminate": "use shutdown()",
    "kill": "use shutdown()",
    "close": "use shutdown()",
    "pid": f"{_PROCESS_OF_DHT}.pid",
    "ident": f"{_PROCESS_OF_DHT}.pid",
    "exitcode": f"{_PROCESS_OF_DHT}.exit_status",
    "name": f"{_PROCESS_OF_DHT}.name",
    "sentinel": "dht.join() waits until the process has ended",
}
_AS_GIVEN = "keep what you gave to the constructor"
_OWN_CALLS = "calls of your own: node.host.serve() and node.host.call() inside dht.run_coroutine()"
_STEERING = (
    "allow_allreduce() lets all-reduce begin, cancel() withdraws, and result() or await waits for the end"
)

ABSENT_OF_OBJECTS: Mapping[str, Mapping[str, str]] = {
    "DecentralizedAverager": {
        **_PROCESS,
        "join": "dht.join() waits until the process has ended",
        "daemon": "the averager lives in the process of its DHT: dht.daemon",
        "lock_averaged_tensors": "use `with averager.get_tensors() as tensors:`, which holds the lock",
        "_averaged_tensors": "use `with averager.get_tensors() as tensors:`",
        "request_timeout": _AS_GIVEN,
        "matchmaking_kwargs": _AS_GIVEN,
        "allreduce_kwargs": _AS_GIVEN,
        "schema_hash": "peers that do not fit are named by the error of a step that found no group",
        "delay_before_averaging": "last_report.phases has the seconds of each phase of a round",
        "add_p2p_handlers": _OWN_CALLS,
        "remove_p2p_handlers": _OWN_CALLS,
        "get_stub": _OWN_CALLS,
        "_p2p": _OWN_CALLS,
    },
    "DHT": {
        **_PROCESS,
        "run": "the node is made by run_in_background(); dht.run_coroutine() runs your own code beside it",
        "replicate_p2p": f"{_LIBP2P}; {_OWN_CALLS}",
        "shutdown_timeout": _AS_GIVEN,
        "kwargs": _AS_GIVEN,
        "num_workers": "there is no such limit; parallel_rpc limits the calls of one search",
    },
    "DHTNode": {
        "store_many": "await asyncio.gather(*(node.store(...) for ...)): calls share connections",
        "get_many": "await asyncio.gather(*(node.get(key) for key in keys)): searches share connections",
        "get_many_by_id": "await asyncio.gather(*(node.get(key) for key in keys)): records are found by their keys",
        "find_nearest_nodes": "searches are internal; node.neighbours lists the peers in the routing table",
        "get_visible_maddrs": "use the first argument of dht.run_coroutine()'s function: dht.get_visible_maddrs()",
        "is_alive": "a node lives from its creation until its shutdown()",
        "node_id": "ids follow from PeerIDs: node.peer_id",
        "p2p": f"{_LIBP2P}: node.host.serve() and node.host.call()",
        "protocol": f"{_LIBP2P}: node.host.serve() and node.host.call()",
        "num_replicas": "see node.config",
        "num_workers": "there is no such limit; node.config.parallel_rpc limits the calls of one search",
        "chunk_size": "there is no such limit",
        "blacklist": "peers that do not answer rest by themselves",
    },
    "StepControl": {
        "get_timeout": "control.deadline - shoal.get_dht_time(), unless the deadline is None",
        "allow_retries": "keep what you gave to step()",
        "data_for_gather": "keep what you gave to step(gather=...)",
        "attach": _STEERING,
        "attach_trigger": _STEERING,
        "wait_for_trigger": _STEERING,
        "wait_for_cancel": _STEERING,
        "can_modify": "see control.began_allreduce",
    },
}
"""Class -> name -> what to use instead."""
