"""An Internet for one test: machines with addresses of their own, firewalls, and sites behind address translators.

Every machine is a network namespace. Each has one link to the hub, which knows a route to every public address and
drops all else in silence, as the Internet does: a private address leads nowhere, and does not say so.

Sites look alike, as homes do: each has the LAN 192.168.1.0/24, and its first machine is 192.168.1.10. So the LAN
address of a machine elsewhere leads to a wrong one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shoal.testing.namespaces import Namespace

# Nobody's any more (RFC 7526, RFC 7535). Python calls those of the documentation private, these it calls global.
PUBLIC_IP4 = "192.88.99.{}"
PUBLIC_IP6 = "2620:4f:8000::{:x}"

DOCKER_IP = "172.17.0.1"

NATS: Mapping[str, str] = {
    "cone": "masquerade",  # one outer port for all destinations, the inner one; strangers stay outside
    "symmetric": "masquerade fully-random",  # another outer port for each destination
    "random": "masquerade random",  # the same by the older way, which hashes
    "fullcone": "masquerade",  # as cone, and everybody may send to an outer port in use
}
"""Kinds of address translators, and the rule that makes them."""


@dataclass
class Machine:
    """A machine: where it is, and how others, or its own LAN, know it."""

    namespace: Namespace
    ip: str = ""
    ip6: str = ""

    @property
    def name(self) -> str:
        return self.namespace.name

    def close_ports(self, *, except_for: Sequence[int] = ()) -> None:
        """A firewall that drops new TCP connections from the link, but for these ports."""
        spared = f"tcp dport != {{ {', '.join(map(str, except_for))} }}" if except_for else "meta l4proto tcp"
        self.namespace.nft(
            f"""
            table inet firewall {{
                chain input {{
                    type filter hook input priority filter;
                    iifname "net0" ct state new {spared} drop
                }}
            }}
            """
        )

    def open_ports(self) -> None:
        """Take the firewall down."""
        self.namespace.nft("delete table inet firewall")

    def cut_link(self, *, incoming: bool = True, outgoing: bool = True) -> None:
        """Drop all packets of the link, also those of connections that stand, in one direction or both."""
        chains = [("input", "iifname")] * incoming + [("output", "oifname")] * outgoing
        rules = "".join(
            f'chain {hook} {{ type filter hook {hook} priority filter; {side} "net0" drop; }}\n'
            for hook, side in chains
        )
        self.namespace.nft(f"table inet cut {{ {rules} }}")

    def mend_link(self) -> None:
        """Undo :meth:`cut_link`."""
        self.namespace.nft("delete table inet cut")

    def add_container_bridge(self) -> None:
        """What Docker adds to a machine: a bridge whose address is the same everywhere, and reached by nobody."""
        self.namespace.ip(
            "link add name docker0 type bridge",
            "link add name veth1 type veth peer name eth1",  # a container, so that the bridge is up
            "link set veth1 master docker0 up",
            "link set eth1 up",
            f"addr add {DOCKER_IP}/16 dev docker0",
            "addr add fd00:d0c::1/64 dev docker0 nodad",
            "link set docker0 up",
        )

    def add_interface(self, name: str, ip: str) -> None:
        """One more interface, whose network no other machine is in."""
        self.namespace.ip(
            f"link add name {name} type veth peer name {name}peer",
            f"addr add {ip}/24 dev {name}",
            f"link set {name} up",
            f"link set {name}peer up",
        )


@dataclass
class Site:
    """A router with a public address, and the machines of its LAN."""

    router: Machine
    machines: list[Machine]

    @property
    def ip(self) -> str:
        """The address that others see."""
        return self.router.ip


class Internet:
    """Makes machines. Everything ends with :meth:`close`."""

    def __init__(self) -> None:
        self._namespaces: list[Namespace] = []
        self._numbers = itertools.count(1)
        self._hub = self._namespace("hub")
        self._hub.sysctl(ipv4__ip_forward=1, ipv6__conf__all__forwarding=1)
        self._hub.ip("route add blackhole default", "route add blackhole ::/0")

    def machine(self, name: str, *, ip4: bool = True, ip6: bool = False) -> Machine:
        """A machine with a public address of each of these families."""
        number = next(self._numbers)
        made = Machine(
            self._namespace(name),
            PUBLIC_IP4.format(number) if ip4 else "",
            PUBLIC_IP6.format(number) if ip6 else "",
        )
        link = f"link{number}"
        self._hub.ip(f"link add name {link} type veth peer name net0 netns {made.namespace.path}")
        at_hub, at_machine = [f"link set {link} up"], ["link set net0 up"]
        if ip4:
            at_hub += [f"addr add 169.254.0.1/32 dev {link}", f"route add {made.ip}/32 dev {link}"]
            at_machine += [
                f"addr add {made.ip}/32 dev net0",
                "route add default via 169.254.0.1 dev net0 onlink",
            ]
        if ip6:
            at_hub += [f"addr add fe80::1/64 dev {link} nodad", f"route add {made.ip6}/128 dev {link}"]
            at_machine += [
                f"addr add {made.ip6}/128 dev net0 nodad",
                "route add ::/0 via fe80::1 dev net0",
            ]
        self._hub.ip(*at_hub)
        made.namespace.ip(*at_machine)
        return made

    def site(
        self,
        name: str,
        nat: str,
        *,
        machines: int = 1,
        forward: Mapping[int, int] | None = None,
        refuse: bool = False,
    ) -> Site:
        """A LAN behind an address translator of one of the kinds :data:`NATS`.

        The router drops what comes unasked, or refuses it, but for connections to the outer ports ``forward``, each
        of which it gives to a port of the first machine.
        """
        made = self._lan(name, machines, subnet="192.168.1")
        forwarded = "".join(
            f'iifname "net0" tcp dport {outer} dnat to {made.machines[0].ip}:{inner}\n'
            for outer, inner in (forward or {}).items()
        )
        mapping = remember = ""
        if nat == "fullcone":
            mapping = (
                "map mapped { type inet_service : ipv4_addr; size 4096; flags dynamic,timeout; timeout 5m; }"
            )
            forwarded += 'iifname "net0" meta l4proto tcp dnat to tcp dport map @mapped\n'
            remember = 'oifname "net0" meta l4proto tcp update @mapped { tcp sport : ip saddr }\n'
        outgoing = remember + f'oifname "net0" {NATS[nat]}'
        made.router.namespace.nft(_translator(mapping, forwarded, outgoing, "accept" if refuse else "drop"))
        return made

    def one_to_one(self, name: str) -> Site:
        """A cloud's machine: it has a private address, and a public one of its own that all of it is reached at."""
        made = self._lan(name, machines=1, subnet="10.0.0")
        inner = made.machines[0].ip
        made.router.namespace.nft(
            _translator("", f'iifname "net0" dnat to {inner}\n', f'oifname "net0" snat to {made.ip}', "drop")
        )
        return made

    def close(self) -> None:
        for namespace in self._namespaces:
            namespace.close()

    def _namespace(self, name: str) -> Namespace:
        made = Namespace(name)
        self._namespaces.append(made)
        # Without waiting for somebody else to claim the same IPv6 address, which takes seconds.
        made.sysctl(ipv6__conf__all__accept_dad=0, ipv6__conf__default__accept_dad=0)
        made.ip("link set lo up")
        return made

    def _lan(self, name: str, machines: int, subnet: str) -> Site:
        router = self.machine(f"{name}-router")
        router.namespace.sysctl(ipv4__ip_forward=1)
        router.namespace.ip(
            "link add name lan type bridge", f"addr add {subnet}.1/24 dev lan", "link set lan up"
        )
        inside = [Machine(self._namespace(f"{name}-{n}"), f"{subnet}.{10 + n}") for n in range(machines)]
        for number, machine in enumerate(inside):
            router.namespace.ip(
                f"link add name port{number} type veth peer name net0 netns {machine.namespace.path}",
                f"link set port{number} master lan up",
            )
            machine.namespace.ip(
                f"addr add {machine.ip}/24 dev net0", "link set net0 up", f"route add default via {subnet}.1"
            )
        return Site(router, inside)


def _translator(mapping: str, incoming: str, outgoing: str, unasked: str) -> str:
    """The rules of a router: translate, let answers in, and keep out what comes from outside unasked."""
    return f"""
    table ip translator {{
        {mapping}
        chain incoming {{
            type nat hook prerouting priority dstnat;
            {incoming}
        }}
        chain outgoing {{
            type nat hook postrouting priority srcnat;
            {outgoing}
        }}
        chain through {{
            type filter hook forward priority filter; policy drop;
            ct state established,related accept
            iifname "lan" accept
            ct status dnat accept
        }}
        chain to_router {{
            type filter hook input priority filter; policy accept;
            ct state established,related accept
            iifname "net0" meta l4proto tcp {unasked}
        }}
    }}
    """
